"""`python -m infra.deploy_bucket s3://bucket/prefix`: make the bucket of a root if there is none yet."""

import sys
from urllib.parse import urlparse


def main(root: str) -> None:
    """Create the bucket; one that is ours already is fine."""
    import boto3  # type: ignore[import-untyped,unused-ignore]

    client, bucket = boto3.client("s3"), urlparse(root).netloc
    if bucket not in {each["Name"] for each in client.list_buckets()["Buckets"]}:
        client.create_bucket(Bucket=bucket)


if __name__ == "__main__":
    main(sys.argv[1])
