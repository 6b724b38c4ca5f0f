// Package stores makes the object stores known to backup.Open: importing it
// brings in the drivers of s3://, gs:// and azblob://. They are heavy, so only
// the commands import it.
//
// # Credentials
//
// Each driver finds them where the tools of its vendor do; none are taken from
// the URL of a store, which ends up in logs and process lists:
//
//	s3      AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile (AWS_PROFILE,
//	        ~/.aws), a web identity token (EKS) or the role of the machine;
//	        the region from AWS_REGION or ?region=
//	gs      GOOGLE_APPLICATION_CREDENTIALS, gcloud auth application-default
//	        login, or the service account of the machine
//	azblob  AZURE_STORAGE_ACCOUNT with AZURE_STORAGE_KEY or
//	        AZURE_STORAGE_SAS_TOKEN, else the default Azure credential
//
// A server that speaks S3 but is not Amazon's is named in the URL:
// s3://bucket/prefix?endpoint=http://minio:9000&use_path_style=true&region=any
package stores

import (
	_ "gocloud.dev/blob/azureblob" // azblob://
	_ "gocloud.dev/blob/gcsblob"   // gs://
	_ "gocloud.dev/blob/s3blob"    // s3://
)
