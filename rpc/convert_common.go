package rpc

import (
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"conveyor.etl/router/router/commandpb"
	"conveyor.etl/router/rpc/routerpb/commonpb"
)

// timestampMs turns Unix milliseconds of the state into an API timestamp; zero
// means that the state holds no time and gives nil.
func timestampMs(ms uint64) *timestamppb.Timestamp {
	if ms == 0 {
		return nil
	}
	return timestamppb.New(time.UnixMilli(int64(ms)))
}

// timestampOf turns the seconds and nanoseconds of the state into an API
// timestamp; both zero means that the caller gave none.
func timestampOf(s int64, ns int32) *timestamppb.Timestamp {
	if s == 0 && ns == 0 {
		return nil
	}
	return &timestamppb.Timestamp{Seconds: s, Nanos: ns}
}

// splitTimestamp is the inverse of timestampOf.
func splitTimestamp(t *timestamppb.Timestamp) (int64, int32) {
	if t == nil {
		return 0, 0
	}
	return t.Seconds, t.Nanos
}

// durationMs turns milliseconds into an API duration.
func durationMs(ms uint64) *durationpb.Duration {
	return durationpb.New(time.Duration(ms) * time.Millisecond)
}

// watermarkToAPI returns nil for nil.
func watermarkToAPI(w *commandpb.Watermark) *commonpb.Watermark {
	if w == nil {
		return nil
	}
	return &commonpb.Watermark{
		SourceId:  w.SourceId,
		Partition: w.Partition,
		Position:  w.Position,
		Timestamp: timestampOf(w.TimeS, w.TimeNs),
	}
}

// endpointToAPI returns nil for nil.
func endpointToAPI(e *commandpb.Endpoint) *commonpb.Endpoint {
	if e == nil {
		return nil
	}
	return &commonpb.Endpoint{Host: e.Host, Port: e.Port, UseTls: e.UseTls}
}

// The API's enums of service types and health have the numbers of the log's
// enums; the tests hold them to that, so a conversion is a cast.

func serviceTypeToAPI(t commandpb.ServiceType) commonpb.ServiceType {
	return commonpb.ServiceType(t)
}

func healthStatusToAPI(h commandpb.HealthStatus) commonpb.HealthStatus {
	return commonpb.HealthStatus(h)
}
