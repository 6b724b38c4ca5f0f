package rpc

//lint:file-ignore SA1019 tools in the field still speak v1alpha of reflection, so it is served and tested

import (
	"context"
	"testing"

	"google.golang.org/grpc"
	v1alpha "google.golang.org/grpc/reflection/grpc_reflection_v1alpha"
)

// knownByV1Alpha tells whether the older reflection service finds symbol.
func knownByV1Alpha(ctx context.Context, t *testing.T, conn *grpc.ClientConn, symbol string) bool {
	t.Helper()
	stream, err := v1alpha.NewServerReflectionClient(conn).ServerReflectionInfo(ctx)
	noError(t, err)
	noError(t, stream.Send(&v1alpha.ServerReflectionRequest{
		MessageRequest: &v1alpha.ServerReflectionRequest_FileContainingSymbol{FileContainingSymbol: symbol},
	}))
	resp, err := stream.Recv()
	noError(t, err)
	return len(resp.GetFileDescriptorResponse().GetFileDescriptorProto()) > 0
}
