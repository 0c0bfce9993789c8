"""A real HTTP server that speaks S3 (moto), one per test module; `bucket` is a fresh bucket of it, as a URI."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator

import boto3
import pytest


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No AWS settings of this machine, and quick failures. Child processes inherit it."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "PIRL_S3_")):
            monkeypatch.delenv(name)
    settings = {
        "AWS_ACCESS_KEY_ID": "test-key-id",
        "AWS_SECRET_ACCESS_KEY": "test-secret-value",
        "AWS_CONFIG_FILE": "/nonexistent",
        "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
        "AWS_EC2_METADATA_DISABLED": "true",
        "PIRL_S3_ATTEMPTS": "2",
        "PIRL_S3_CONNECT_TIMEOUT_S": "2",
        "PIRL_S3_READ_TIMEOUT_S": "10",
        "PIRL_STORAGE_PATIENCE_S": "0",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def bucket(s3_endpoint: str, s3_environment: None, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    name = f"pirl-{uuid.uuid4().hex[:12]}"
    boto3.client("s3", region_name="us-east-1").create_bucket(Bucket=name)
    return f"s3://{name}"
