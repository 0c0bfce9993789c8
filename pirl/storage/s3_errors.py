"""Errors of the S3 client as `StorageError` and `UsageError`, with `transient` right.

Everything that boto3, botocore, s3transfer and urllib3 define counts, whatever else it inherits: four classes of
botocore are an `OSError` too. `tests/test_storage_errors.py` walks all of them and pins the table.
"""

from __future__ import annotations

import http.client
import re
import ssl
from concurrent.futures import CancelledError
from functools import cache
from typing import Any
from urllib.parse import urlsplit

from pirl.errors import PirlError, StorageError, StorageNotFoundError, UsageError
from pirl.storage.base import FULL_HINT, without_login

_PACKAGES = ("boto3", "botocore", "s3transfer", "urllib3")


def error_code(error: BaseException) -> str:
    """Return the code of an S3 answer, empty for any other error."""
    answer = getattr(error, "response", None)  # urllib3 has an attribute of this name too
    return str(answer.get("Error", {}).get("Code", "")) if isinstance(answer, dict) else ""


def is_transient(error: BaseException) -> bool:
    """Return whether the same request may succeed later without anybody's doing."""
    from botocore import exceptions as boto

    error = _innermost(error)
    if isinstance(error, boto.ClientError):
        return _reason(error) == _BUSY
    if type(error) is boto.HTTPClientError and isinstance(getattr(error, "kwargs", {}).get("error"), ValueError):
        return False  # a header or a URL that no HTTP client takes
    transient, permanent, _ = _classes()
    return isinstance(error, transient) and not isinstance(error, permanent)


def explain(error: BaseException, action: str, bucket: str, endpoint: str, attempts: int) -> PirlError | None:
    """Return the error for the user, None for one that the client did not raise. It repeats no text of the server.

    `action` is what was asked for, such as "read s3://bucket/name".
    """
    from botocore import exceptions as boto

    if not _is_of_client(error):
        return None
    error = _innermost(error)
    if isinstance(error, boto.ClientError):
        return _explain_answer(error, action, bucket)
    if isinstance(error, _classes()[2]):
        return UsageError(
            f"Cannot {action}: the AWS configuration does not work: {_text(error)}",
            "Check AWS_PROFILE, AWS_REGION, AWS_ENDPOINT_URL and the other AWS_* settings, and ~/.aws/config.",
        )
    if isinstance(error, boto.CredentialRetrievalError | boto.MetadataRetrievalError):
        return StorageError(
            f"Cannot {action}: the S3 credentials could not be renewed ({type(error).__name__}).",
            "Check the profile or the pod's service account, and whether the credential service answers.",
            transient=True,
        )
    if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError):
        return StorageError(
            f"Cannot {action}: no usable S3 credentials found.",
            "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give the pod a service account.",
        )
    if is_certificate(error):
        return StorageError(
            f"Cannot {action}: the certificate of {_host(error, endpoint)} is not trusted.",
            "Set AWS_CA_BUNDLE to a file with the certificate of the CA that signed it; check AWS_ENDPOINT_URL and "
            "the clock.",
            transient=True,  # a load balancer that restarts shows a wrong one for a while
        )
    if is_transient(error):
        return StorageError(
            f"Cannot {action}: the S3 endpoint {_host(error, endpoint)} is unavailable or breaks off "
            f"({type(error).__name__}, {attempts} tries).",
            "Check AWS_ENDPOINT_URL (AWS_ENDPOINT_URL_S3), the network and whether the server is up.",
            transient=True,
        )
    if isinstance(error, boto.HTTPClientError):  # its text may repeat the headers that were refused
        return StorageError(
            f"Cannot {action}: the request is not valid ({type(error).__name__}).",
            "Check the AWS_* settings for blanks and line breaks, and the name of the object.",
        )
    return StorageError(
        f"Cannot {action}: {_text(error)}",
        "Check the AWS settings of this machine (AWS_*, ~/.aws).",
    )


def missing_bucket(bucket: str) -> StorageError:
    """Return the error for a bucket that does not exist."""
    return StorageError(
        f"The bucket {bucket!r} does not exist.",
        "Check its name and AWS_ENDPOINT_URL, or create it (`aws s3 mb`).",
    )


def is_certificate(error: BaseException) -> bool:
    """Return whether the server's certificate was refused."""
    seen: set[int] = set()
    pending: list[Any] = [error]
    while pending:
        part = pending.pop()
        if not isinstance(part, BaseException) or id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, ssl.SSLCertVerificationError):
            return True
        pending += [part.__cause__, part.__context__, getattr(part, "reason", None), *part.args]
        pending.append(getattr(part, "kwargs", {}).get("error"))
    return False


def _is_of_client(error: BaseException) -> bool:
    if isinstance(error, OSError | http.client.HTTPException | CancelledError):
        return True  # local files have their own errors: `LocalFile`
    return any(kind.__module__.partition(".")[0] in _PACKAGES for kind in type(error).__mro__)


def _innermost(error: BaseException) -> BaseException:
    """Return what a wrapper of s3transfer or boto3 was raised for."""
    while (inner := getattr(error, "last_exception", None)) is not None:
        error = inner
    if type(error).__name__ == "S3UploadFailedError" and (inner := error.__cause__ or error.__context__):
        return inner if _is_of_client(inner) else error
    return error


def _text(error: BaseException) -> str:
    return re.sub(r"//[^/@\s]*@", "//", str(error)) or type(error).__name__


def _host(error: BaseException, endpoint: str) -> str:
    """Return the host that failed: of S3, or of the service that hands out credentials."""
    url = str(getattr(error, "kwargs", {}).get("endpoint_url") or "")
    return urlsplit(without_login(url)).netloc or urlsplit(endpoint).netloc or "chosen"


@cache
def _classes() -> tuple[tuple[type[BaseException], ...], ...]:
    """Return the classes of transient errors, of exceptions to these, and of mistakes in the configuration."""
    from boto3 import exceptions as boto3
    from botocore import exceptions as boto
    from botocore.parsers import ResponseParserError
    from s3transfer import exceptions as transfer
    from urllib3 import exceptions as http3

    configuration = (
        boto.BaseEndpointResolverError,
        boto.ConfigNotFound,
        boto.ConfigParseError,
        boto.EndpointProviderError,
        boto.InvalidChecksumConfigError,
        boto.InvalidConfigError,
        boto.InvalidDefaultsMode,
        boto.InvalidEndpointConfigurationError,
        boto.InvalidEndpointDiscoveryConfigurationError,
        boto.InvalidIMDSEndpointError,
        boto.InvalidIMDSEndpointModeError,
        boto.InvalidProxiesConfigError,
        boto.InvalidRegionError,
        boto.InvalidRetryConfigurationError,
        boto.InvalidS3AddressingStyleError,
        boto.InvalidS3UsEast1RegionalEndpointConfigError,
        boto.InvalidSTSRegionalEndpointsConfigError,
        boto.ProfileNotFound,
        boto.UnknownRegionError,
        boto.UnsupportedS3ConfigurationError,
        boto3.InvalidCrtTransferConfigError,
        http3.LocationValueError,
        http3.ProxySchemeUnsupported,
    )
    transient = (
        boto.CapacityNotAvailableError,
        boto.ChecksumError,
        boto.ConnectionError,
        boto.CredentialRetrievalError,
        boto.FlexibleChecksumError,
        boto.HTTPClientError,
        boto.IncompleteReadError,
        boto.MetadataRetrievalError,
        ResponseParserError,
        transfer.S3DownloadFailedError,
        transfer.S3ValidationError,
        http3.DecodeError,
        http3.PoolError,
        http3.ProtocolError,
        http3.ProxyError,
        http3.ResponseError,
        http3.SSLError,
        http3.TimeoutError,
        http.client.HTTPException,
        ConnectionError,
        TimeoutError,
        ssl.SSLError,
    )
    return transient, (http3.HostChangedError, *configuration), configuration


_REFUSED = (
    "access denied",
    "The account in use needs s3:GetObject, s3:PutObject, s3:DeleteObject and s3:ListBucket there "
    "(without ListBucket even an absent object is answered so).",
)
_BAD_CREDENTIALS = (
    "the S3 server does not accept the credentials",
    "Renew them: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, the profile, or the pod's service account; "
    "and check AWS_ENDPOINT_URL.",
)
_WRONG_REGION = ("the bucket is in another region", "Set AWS_REGION to the bucket's region.")
_BUSY = ("the S3 server is overloaded or failing", "Run the same command again later; PIRL_S3_ATTEMPTS sets the tries.")
_S3_FULL = ("the S3 server has no space or quota left", FULL_HINT)
_LACKING = (
    "the S3 server lacks a feature that is needed",
    "Use a server with conditional writes (If-None-Match); for checksums try "
    "AWS_REQUEST_CHECKSUM_CALCULATION=when_required.",
)
_ABSENT = ("404", "NoSuchKey", "NotFound")
_BUSY_STATUSES = (408, 425, 429, 500, 502, 503, 504)
_REASONS: dict[str, tuple[str, str]] = {
    **dict.fromkeys(("AccessDenied", "403", "Forbidden", "AllAccessDisabled", "AccountProblem"), _REFUSED),
    **dict.fromkeys(("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "401"), _BAD_CREDENTIALS),
    **dict.fromkeys(("ExpiredToken", "TokenRefreshRequired", "ExpiredTokenException"), _BAD_CREDENTIALS),
    **dict.fromkeys(("PermanentRedirect", "301", "307", "AuthorizationHeaderMalformed"), _WRONG_REGION),
    **dict.fromkeys(("QuotaExceeded", "XMinioStorageFull", "InsufficientCapacity", "507"), _S3_FULL),
    **dict.fromkeys(("SlowDown", "ServiceUnavailable", "InternalError", "RequestTimeout"), _BUSY),
    **dict.fromkeys(("Throttling", "ThrottlingException", "ThrottledException", "RequestThrottled"), _BUSY),
    **dict.fromkeys(
        ("TooManyRequests", "RequestLimitExceeded", "BandwidthLimitExceeded", "PriorRequestNotComplete"), _BUSY
    ),
    # The bytes changed on their way, or another write to the object was under way.
    **dict.fromkeys(("BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch"), _BUSY),
    **dict.fromkeys(("OperationAborted", "ConditionalRequestConflict", "IDPCommunicationError"), _BUSY),
    "RequestTimeTooSkewed": ("this machine's clock differs from the server's", "Set the clock (NTP)."),
    "NotImplemented": _LACKING,
}


def _reason(error: BaseException) -> tuple[str, str]:
    """Return the reason and the hint for an answer, by its code or else its HTTP status."""
    code = error_code(error)
    if code in _REASONS:
        return _REASONS[code]
    status = getattr(error, "response", {}).get("ResponseMetadata", {}).get("HTTPStatusCode")
    if status in _BUSY_STATUSES or (code.isdigit() and int(code) in _BUSY_STATUSES):
        return _BUSY
    return f"the S3 server answered {code}", "Look this code up in the server's documentation."


def _explain_answer(error: BaseException, action: str, bucket: str) -> StorageError:
    code = error_code(error)
    if code in _ABSENT:
        return StorageNotFoundError(
            f"{action.partition(' ')[2]} does not exist.", "Check the URI, or run the step that writes it."
        )
    if code == "NoSuchBucket":
        return missing_bucket(bucket)
    reason, hint = _reason(error)
    return StorageError(f"Cannot {action}: {reason}.", hint, transient=(reason, hint) == _BUSY)
