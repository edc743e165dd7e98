"""No secret in an address is shown; what is none stays as it is."""

import pytest

from nightseg.errors import UserError
from nightseg.storage.credentials import hide_credentials, refuse_credentials

WITH = [
    ("s3://AKIA123:ge/he+im=@bucket/a", "s3://***@bucket/a"),
    ("s3://AKIA123:ge@heim@bucket/a b", "s3://***@bucket/a b"),
    ("s3://AKIA123:1geheim@bucket", "s3://***@bucket"),
    ("s3://geheim@bucket/a", "s3://***@bucket/a"),
    ("https://user:geheim@host:9000/a", "https://***@host:9000/a"),
    ("https://ghp_geheim@host/a.git", "https://***@host/a.git"),
    ("https://:geheim@host/a", "https://***@host/a"),
    ("sftp://me:geheim@host/a", "sftp://***@host/a"),
    ("abfs://container:geheim@account/a", "abfs://***@account/a"),
    ("s3://bucket/a?access_key=geheim&secret_key=geheim2&region=x", "s3://bucket/a?access_key=***&secret_key=***&region=x"),
    ("s3://bucket/a?region=x&session_token=geheim", "s3://bucket/a?region=x&session_token=***"),
    (
        "https://b.s3.amazonaws.com/a?X-Amz-Credential=geheim%2Fx&X-Amz-Signature=geheim&X-Amz-Date=1",
        "https://b.s3.amazonaws.com/a?X-Amz-Credential=***&X-Amz-Signature=***&X-Amz-Date=1",
    ),
    ("https://b.s3.amazonaws.com/a?AWSAccessKeyId=geheim&Signature=geheim", "https://b.s3.amazonaws.com/a?AWSAccessKeyId=***&Signature=***"),
    ("https://x.blob.core.windows.net/c/a?sv=2022&sig=geheim%3D", "https://x.blob.core.windows.net/c/a?sv=2022&sig=***"),
    ("https://storage.googleapis.com/b/a?X-Goog-Signature=geheim", "https://storage.googleapis.com/b/a?X-Goog-Signature=***"),
    ("abfs://c@a/x?account_key=geheim", "abfs://c@a/x?account_key=***"),
    ("https://host/a?password=geheim", "https://host/a?password=***"),
    ("https://host/a?access_token=geheim", "https://host/a?access_token=***"),
    ("https://host/a#auth=geheim", "https://host/a#auth=***"),
]  # fmt: skip
WITHOUT = [
    "s3://bucket/a@b/c:d.png",
    "s3://bucket/a?region=eu-west-1&endpoint_override=localhost:9000&scheme=http",
    "http://localhost:9000/a@b",
    "abfs://container@account.dfs.core.windows.net/a",
    "sftp://me@host/a",
    "memory://a/b",
    "/data/user:x@host/key=1",
    "process 7 on far, since 2026-11-29T10:00:00: nightseg run a.yaml --set seed=1",
]


@pytest.mark.parametrize(("uri", "shown"), WITH)
def test_credentials_are_hidden_and_refused(uri: str, shown: str) -> None:
    assert hide_credentials(uri) == shown
    assert hide_credentials(f"reading '{uri}' failed") == f"reading '{shown}' failed"
    assert hide_credentials(shown) == shown
    with pytest.raises(UserError, match="holds credentials") as caught:
        refuse_credentials(uri, "datasets.day.root")
    assert str(caught.value).startswith("datasets.day.root: ") and "geheim" not in str(caught.value)


@pytest.mark.parametrize("text", WITHOUT)
def test_what_holds_none_stays(text: str) -> None:
    assert hide_credentials(text) == text
    refuse_credentials(text)


def test_several_in_one_text() -> None:
    text = "--set a=s3://k:geheim@b --set c=s3://d/e?token=geheim --run-dir 's3://k:geheim@b/x y'"
    assert hide_credentials(text) == "--set a=s3://***@b --set c=s3://d/e?token=*** --run-dir 's3://***@b/x y'"
