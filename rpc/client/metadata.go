package client

import (
	"context"
	"strconv"

	"google.golang.org/grpc/metadata"

	"conveyor.etl/router/rpc/routerpb/adminpb"
)

// Names of the metadata of the API.
const (
	metadataConsistency = "conveyor-consistency"
	metadataMinRevision = "conveyor-min-revision"
	metadataRevision    = "conveyor-revision"
	metadataClusterID   = "conveyor-cluster-id"
	metadataRequestID   = "conveyor-request-id"
	metadataEpoch       = "conveyor-epoch"
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

// InEpoch makes calls of ctx fail, undone, when the state is no longer of this
// restore epoch: it was replaced by a backup since, and what the caller knows has
// to be read again. For a stream of commits it fences all its batches.
func InEpoch(ctx context.Context, epoch uint64) context.Context {
	return metadata.AppendToOutgoingContext(ctx, metadataEpoch, strconv.FormatUint(epoch, 10))
}

// Expect returns what a compare-and-set of a pipeline insists on so that nothing
// has happened since st was read, for ExpectedVersion and ExpectedEpoch of its
// request. The version alone does not say that: a restore may give a pipeline the
// same one again.
func Expect(st *adminpb.PipelineStatus) (version, epoch *uint64) {
	v, e := st.GetVersion(), st.GetEpoch()
	return &v, &e
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

// Epoch reads the restore epoch an answer is of from its headers, 0 when they hold
// none. A revision means something only together with it.
func Epoch(header metadata.MD) uint64 {
	v := header.Get(metadataEpoch)
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
