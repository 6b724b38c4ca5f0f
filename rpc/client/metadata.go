package client

import (
	"context"
	"strconv"

	"google.golang.org/grpc/metadata"
)

// Names of the metadata of the API.
const (
	metadataConsistency = "conveyor-consistency"
	metadataMinRevision = "conveyor-min-revision"
	metadataRevision    = "conveyor-revision"
	metadataClusterID   = "conveyor-cluster-id"
	metadataRequestID   = "conveyor-request-id"
	errorDomain         = "conveyor.etl"
)

// Stale makes reads of ctx be answered by the node asked from what it has, with
// or without a leader. The revision of the answer says how old that is.
func Stale(ctx context.Context) context.Context {
	return metadata.AppendToOutgoingContext(ctx, metadataConsistency, "stale")
}

// AtLeast makes reads of ctx reflect at least revision. With Stale this reads
// one's own writes without asking the leader.
func AtLeast(ctx context.Context, revision uint64) context.Context {
	return metadata.AppendToOutgoingContext(ctx, metadataMinRevision, strconv.FormatUint(revision, 10))
}

// WithRequestID gives a mutation an id of the caller's: at most 128 bytes of
// printable ASCII. A repetition with the same id, by whatever process, returns
// the first result, for as long as the cluster remembers it.
func WithRequestID(ctx context.Context, id string) context.Context {
	return metadata.AppendToOutgoingContext(ctx, metadataRequestID, id)
}

// Revision reads the revision an answer reflects from its headers (grpc.Header),
// 0 when they hold none.
func Revision(header metadata.MD) uint64 {
	v := header.Get(metadataRevision)
	if len(v) != 1 {
		return 0
	}
	n, err := strconv.ParseUint(v[0], 10, 64)
	if err != nil {
		return 0
	}
	return n
}

// ClusterID reads the id of the cluster that answered, "" when there is none.
func ClusterID(header metadata.MD) string {
	if v := header.Get(metadataClusterID); len(v) == 1 {
		return v[0]
	}
	return ""
}
