"""Object stores that speak S3, by botocore."""
