package rpc

import (
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"conveyor.etl/router/router"
	"conveyor.etl/router/rpc/routerpb/adminpb"
)

// CheckPipeline returns every reason for which CreatePipeline would refuse c
// whatever the state of the cluster, for tools that check without one.
func CheckPipeline(c *adminpb.PipelineConfig) []string {
	var out []string
	if err := checkPipelineShape(proto.Size(c), c); err != nil {
		out = append(out, status.Convert(err).Message())
	}
	return append(out, router.ValidatePipeline(specFromAPI(c))...)
}
