"""A bucket of an S3 server on loopback, over real HTTP, whose objects a test can look at."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import servers

SECRETS = ("s3cr3t", "AKIATEST")
"""The credentials of the server; no output may have them."""


class Store:
    """A bucket. ``url`` begins the URLs of its objects."""

    def __init__(self, client: Any, bucket: str) -> None:
        self.client, self.bucket, self.url = client, bucket, f"s3://{bucket}"

    def clear(self) -> None:
        for key in self.objects():
            self.client.delete_object(Bucket=self.bucket, Key=key)

    def objects(self) -> dict[str, bytes]:
        listed = self.client.list_objects_v2(Bucket=self.bucket).get("Contents", [])
        return {one["Key"]: self.client.get_object(Bucket=self.bucket, Key=one["Key"])["Body"].read() for one in listed}

    def put(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=key, Body=data)

    def parts_of(self, key: str) -> int:
        """Returns in how many parts an object was sent."""
        tag = self.client.head_object(Bucket=self.bucket, Key=key)["ETag"].strip('"')
        return int(tag.partition("-")[2] or 1)

    def uploads(self) -> list[str]:
        """Returns the keys of unfinished uploads."""
        return [one["Key"] for one in self.client.list_multipart_uploads(Bucket=self.bucket).get("Uploads", [])]


@contextmanager
def serving_s3() -> Iterator[Store]:
    """Starts a server in this process; what the block starts finds it by the environment."""
    import logging

    import boto3
    import fsspec

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory() as nothing,
        servers.s3(Path(nothing), patch),
    ):
        settings = {"endpoint_url": os.environ["AWS_ENDPOINT_URL"]}
        patch.setenv("FSSPEC_S3", json.dumps(settings))
        patch.setitem(fsspec.config.conf, "s3", settings)
        yield Store(boto3.client("s3"), "models")
