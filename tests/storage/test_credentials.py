"""No secret in an address is shown; what is none stays as it is."""

import pytest

from nightseg.errors import UserError
from nightseg.storage.credentials import hide_credentials, hide_in_address, refuse_credentials
from nightseg.storage.paths import Location

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
    ("s3://AKIA123:7/geheim+/=@bucket/a", "s3://***@bucket/a"),
    ("s3://AKIA123:7?geheim@bucket", "s3://***@bucket"),
    ("gs://AKIA123:77#geheim@bucket", "gs://***@bucket"),
    ("az://me:7/geheim@container/a", "az://***@container/a"),
    ("s3://AKIA123:ge heim@bucket/a", "s3://***@bucket/a"),
    ("s3://AKIA123%3Age/heim%40bucket/a", "s3://***@bucket/a"),
    ("s3:/AKIA123:geheim@bucket/a", "s3:/***@bucket/a"),
    ("s3:///AKIA123:7/geheim@bucket/a", "s3:///***@bucket/a"),
    ("https:/me:geheim@host/a", "https:/***@host/a"),
    ("https://me:7geheim@host/a", "https://***@host/a"),
    ("s3://bucket/a?pass=geheim&region=x", "s3://bucket/a?pass=***&region=x"),
    ("s3://bucket?passphrase=geheim", "s3://bucket?passphrase=***"),
    ("s3://bucket?pw=geheim", "s3://bucket?pw=***"),
    ("s3://bucket?aws_session=geheim", "s3://bucket?aws_session=***"),
    ("s3://bucket?endpoint_override=u:geheim@host&region=x", "s3://bucket?endpoint_override=***@host&region=x"),
    ("s3://bucket?endpoint_override=http%3A%2F%2Fu%3Ageheim%40host", "s3://bucket?endpoint_override=***@host"),
]  # fmt: skip
WITHOUT = [
    "s3://bucket/a@b/c:d.png",
    "s3://bucket/a?region=eu-west-1&endpoint_override=localhost:9000&scheme=http",
    "s3://bucket/a@b:c.png",
    "s3://bucket/12:30:00@camera/a.png?region=x",
    "s3://bucket/x?region=eu&endpoint_override=localhost:9000",
    "s3://bucket?endpoint_override=http://localhost:9000/a@b",
    "s3://bucket?email=me@host",
    "az://container@account/a",
    "http://localhost:9000/a@b",
    "submitted to http://127.0.0.1:8265: ask admin@host",
    "python day.py --url http://localhost:9000 --mail me@host",
    "abfs://container@account.dfs.core.windows.net/a",
    "sftp://me@host/a",
    "memory://a/b",
    "/data/user:x@host/key=1",
    "/data/s3/12:30@camera.png",
    "./s3:12@x.png",
    "user:x@host",
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


def test_of_one_address_also_spaces_and_quotes_are_hidden() -> None:
    uri = "s3://AKIA123: ge'h e\"im@bucket/a?secret_key=ge heim"
    assert hide_in_address(uri) == "s3://***@bucket/a?secret_key=***"
    assert str(Location(uri)) == "s3://***@bucket/a?secret_key=***"
    with pytest.raises(UserError, match="holds credentials") as caught:
        refuse_credentials(uri)
    assert "heim" not in str(caught.value) and "im@" not in str(caught.value)


def test_a_sentence_behind_an_address_is_none_of_it() -> None:
    text = "s3://bucket: there is none; 's3://bucket:9000 is no place', asked by me@host"
    assert hide_credentials(text) == text


def test_an_address_that_lacks_a_slash_is_no_local_path() -> None:
    with pytest.raises(UserError, match=r"'s3:/\*\*\*@bucket' holds credentials"):
        Location.of("s3:/AKIA123:geheim@bucket")
    assert Location.of("12:30/a@b.png").is_local
