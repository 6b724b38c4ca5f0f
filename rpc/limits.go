package rpc

import (
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"conveyor.etl/router/router"
	"conveyor.etl/router/rpc/routerpb/adminpb"
	"conveyor.etl/router/rpc/routerpb/checkpointpb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
	"conveyor.etl/router/rpc/routerpb/commonpb"
	"conveyor.etl/router/rpc/routerpb/registrypb"
	"conveyor.etl/router/rpc/routerpb/sidecarpb"
)

// The limits of the API. A request beyond one is refused with INVALID_ARGUMENT
// naming the field; nothing of it is done.
const (
	// MaxRequestBytes bounds every received message; what gRPC and the existing
	// clients take for granted.
	MaxRequestBytes = 4 << 20
	// MaxCheckpointBytes bounds the data of one checkpoint.
	MaxCheckpointBytes = 1 << 20
	// MaxCheckpointOffsets bounds the source offsets of one checkpoint.
	MaxCheckpointOffsets = 10_000
	// MaxBatchOps bounds the operations of one commit batch.
	MaxBatchOps = 4096
	// MaxBatchBytes bounds one commit batch, so that it fits a log entry
	// with room to spare.
	MaxBatchBytes = 2 << 20
	// MaxPipelineBytes bounds the encoded config of one pipeline.
	MaxPipelineBytes = 1 << 20
	// MaxLocalServices bounds the services one sidecar reports, and those that
	// register with its id.
	MaxLocalServices = 256
	// MaxStreamedSidecars bounds the sidecars that beat on one stream.
	MaxStreamedSidecars = 4096
	// MaxLabels bounds every map of labels or metadata.
	MaxLabels = 128
	// MaxText bounds one free string: a name, label key, version, capability.
	MaxText = 256
	// MaxLongText bounds a description, a label value or a message.
	MaxLongText = 4096
	// MaxRequestID bounds the metadata conveyor-request-id.
	MaxRequestID = 128
	// MaxPartitions bounds the partitions of one group.
	MaxPartitions = 16384
	// MaxPageSize bounds, and DefaultPageSize sets, what one page of a listing
	// holds.
	MaxPageSize     = 10_000
	DefaultPageSize = 1_000
	// MaxHeartbeatInterval bounds the interval a service may ask for.
	MaxHeartbeatInterval = time.Hour
)

// invalid refuses a request because of one field of it.
func invalid(field, format string, args ...any) error {
	return InvalidArgument(field, fmt.Sprintf(format, args...)).Err()
}

func checkID(field, id string) error {
	if fault := router.CheckID(id); fault != "" {
		return invalid(field, "%s", fault)
	}
	return nil
}

func checkOptionalID(field, id string) error {
	if id == "" {
		return nil
	}
	return checkID(field, id)
}

func checkText(field, s string, limit int) error {
	if len(s) > limit {
		return invalid(field, "%d bytes, the limit is %d", len(s), limit)
	}
	if !utf8.ValidString(s) {
		return invalid(field, "not valid UTF-8")
	}
	return nil
}

func checkTexts(field string, ss []string, count, limit int) error {
	if len(ss) > count {
		return invalid(field, "%d values, the limit is %d", len(ss), count)
	}
	for _, s := range ss {
		if err := checkText(field, s, limit); err != nil {
			return err
		}
	}
	return nil
}

func checkLabels(field string, m map[string]string) error {
	if len(m) > MaxLabels {
		return invalid(field, "%d pairs, the limit is %d", len(m), MaxLabels)
	}
	for k, v := range m {
		if k == "" {
			return invalid(field, "a key is empty")
		}
		if err := checkText(field, k, MaxText); err != nil {
			return err
		}
		if err := checkText(field, v, MaxLongText); err != nil {
			return err
		}
	}
	return nil
}

func checkTimestamp(field string, t *timestamppb.Timestamp) error {
	if t == nil {
		return nil
	}
	if err := t.CheckValid(); err != nil {
		return invalid(field, "%v", err)
	}
	return nil
}

func checkDuration(field string, d *durationpb.Duration, limit time.Duration) error {
	if d == nil {
		return nil
	}
	if err := d.CheckValid(); err != nil {
		return invalid(field, "%v", err)
	}
	if v := d.AsDuration(); v < 0 || v > limit {
		return invalid(field, "%v is not between 0 and %v", v, limit)
	}
	return nil
}

// hostPort checks that s is a dialable host:port and returns it in the form
// net.Dial takes. A sidecar builds its endpoint as IP, colon, port, without the
// brackets an IPv6 address needs: that form is understood and mended, because
// refusing it would keep every sidecar of an IPv6 cluster from starting.
func hostPort(field, s string) (string, error) {
	if len(s) > MaxText {
		return "", invalid(field, "%d bytes, the limit is %d", len(s), MaxText)
	}
	if strings.Contains(s, "://") {
		return "", invalid(field, "%q has a scheme; give host:port alone", s)
	}
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		i := strings.LastIndexByte(s, ':')
		if i < 0 {
			return "", invalid(field, "%q is not host:port", s)
		}
		addr, aerr := netip.ParseAddr(s[:i])
		if aerr != nil || !addr.Is6() {
			return "", invalid(field, "%q is not host:port", s)
		}
		host, port = s[:i], s[i+1:]
	}
	if err := checkHost(field, host); err != nil {
		return "", err
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return "", invalid(field, "%q: the port must be a number from 1 to 65535", s)
	}
	return net.JoinHostPort(host, port), nil
}

func checkHost(field, host string) error {
	if host == "" {
		return invalid(field, "the host is empty")
	}
	if len(host) > 253 {
		return invalid(field, "the host has %d bytes, the limit is 253", len(host))
	}
	for i := 0; i < len(host); i++ {
		c := host[i]
		if c <= ' ' || c >= 0x7f || strings.IndexByte(`/\?#@"'<>`, c) >= 0 {
			return invalid(field, "the host %q has characters a host cannot have", host)
		}
	}
	return nil
}

func checkRequestID(id string) error {
	if len(id) > MaxRequestID {
		return invalid(MetadataRequestID, "%d bytes, the limit is %d", len(id), MaxRequestID)
	}
	for i := 0; i < len(id); i++ {
		if id[i] < ' ' || id[i] > '~' {
			return invalid(MetadataRequestID, "must be printable ASCII")
		}
	}
	return nil
}

// pageSize applies the default and the bound of a listing.
func pageSize(n uint32) int {
	switch {
	case n == 0:
		return DefaultPageSize
	case n > MaxPageSize:
		return MaxPageSize
	}
	return int(n)
}

// checkRegisterSidecar checks a registration and puts its endpoints into the
// form net.Dial takes. A local service may have an empty name, see localName.
func checkRegisterSidecar(r *sidecarpb.RegisterSidecarRequest) error {
	if err := checkID("sidecar_id", r.GetSidecarId()); err != nil {
		return err
	}
	if err := checkText("pod_name", r.GetPodName(), MaxText); err != nil {
		return err
	}
	if err := checkText("namespace", r.GetNamespace(), MaxText); err != nil {
		return err
	}
	ep, err := hostPort("sidecar_endpoint", r.GetSidecarEndpoint())
	if err != nil {
		return err
	}
	r.SidecarEndpoint = ep
	if n := len(r.GetLocalServices()); n > MaxLocalServices {
		return invalid("local_services", "%d services, the limit is %d", n, MaxLocalServices)
	}
	for i, ls := range r.GetLocalServices() {
		field := "local_services[" + strconv.Itoa(i) + "]"
		if ls == nil {
			return invalid(field, "is empty")
		}
		if err := checkText(field+".service_name", ls.ServiceName, MaxText); err != nil {
			return err
		}
		if _, ok := sidecarpb.ServiceType_name[int32(ls.ServiceType)]; !ok {
			return invalid(field+".service_type", "%d is no service type", ls.ServiceType)
		}
		if ls.LocalEndpoint, err = hostPort(field+".local_endpoint", ls.LocalEndpoint); err != nil {
			return err
		}
	}
	return checkLabels("labels", r.GetLabels())
}

func checkHeartbeat(r *sidecarpb.SidecarHeartbeatRequest) error {
	if err := checkID("sidecar_id", r.GetSidecarId()); err != nil {
		return err
	}
	if err := checkText("registration_id", r.GetRegistrationId(), MaxText); err != nil {
		return err
	}
	if n := len(r.GetServiceHealth()); n > MaxLocalServices {
		return invalid("service_health", "%d services, the limit is %d", n, MaxLocalServices)
	}
	for _, h := range r.GetServiceHealth() {
		if err := checkText("service_health.service_name", h.GetServiceName(), MaxText); err != nil {
			return err
		}
	}
	return nil
}

func checkRegister(r *registrypb.RegisterRequest) error {
	id := r.GetIdentity()
	if id == nil {
		return invalid("identity", "is missing")
	}
	if r.GetEndpoint() == nil {
		return invalid("endpoint", "is missing")
	}
	if err := checkID("identity.service_id", id.ServiceId); err != nil {
		return err
	}
	if id.Name == "" {
		return invalid("identity.name", "is empty")
	}
	if err := checkText("identity.name", id.Name, MaxText); err != nil {
		return err
	}
	if err := checkText("identity.version", id.Version, MaxText); err != nil {
		return err
	}
	if err := checkTexts("identity.capabilities", id.Capabilities, MaxLabels, MaxText); err != nil {
		return err
	}
	if err := checkOptionalID("identity.group_id", id.GroupId); err != nil {
		return err
	}
	if err := checkServiceType("identity.service_type", id.ServiceType); err != nil {
		return err
	}
	// An address in brackets and one without are the same; the state holds the
	// bare form, so that joining host and port is always right.
	ep := r.GetEndpoint()
	ep.Host = strings.TrimSuffix(strings.TrimPrefix(ep.Host, "["), "]")
	if err := checkHost("endpoint.host", ep.Host); err != nil {
		return err
	}
	if ep.Port == 0 || ep.Port > 65535 {
		return invalid("endpoint.port", "%d is not between 1 and 65535", ep.Port)
	}
	md := r.GetMetadata()
	if err := checkLabels("metadata.labels", md.GetLabels()); err != nil {
		return err
	}
	if err := checkTexts("metadata.record_types_handled", md.GetRecordTypesHandled(), MaxLabels, MaxText); err != nil {
		return err
	}
	if err := checkDuration("heartbeat_interval", r.GetHeartbeatInterval(), MaxHeartbeatInterval); err != nil {
		return err
	}
	return checkOptionalID("sidecar_id", r.GetSidecarId())
}

func checkServiceType(field string, t commonpb.ServiceType) error {
	if _, ok := commonpb.ServiceType_name[int32(t)]; !ok {
		return invalid(field, "%d is no service type", t)
	}
	return nil
}

func checkHealth(h *registrypb.ServiceHealth) error {
	if _, ok := commonpb.HealthStatus_name[int32(h.GetStatus())]; !ok {
		return invalid("health.status", "%d is no health status", h.GetStatus())
	}
	if err := checkText("health.message", h.GetMessage(), MaxLongText); err != nil {
		return err
	}
	if n := len(h.GetComponents()); n > MaxLabels {
		return invalid("health.components", "%d components, the limit is %d", n, MaxLabels)
	}
	for k, c := range h.GetComponents() {
		if err := checkText("health.components", k, MaxText); err != nil {
			return err
		}
		if err := checkText("health.components", c.GetName(), MaxText); err != nil {
			return err
		}
		if err := checkText("health.components", c.GetMessage(), MaxLongText); err != nil {
			return err
		}
	}
	return nil
}

// checkPipelineShape refuses what must not reach the log whatever the graph
// says; the graph's own faults are reported by router.ValidatePipeline.
func checkPipelineShape(size int, c *adminpb.PipelineConfig) error {
	if err := checkID("config.id", c.GetId()); err != nil {
		return err
	}
	if size > MaxPipelineBytes {
		return invalid("config", "%d bytes, the limit is %d", size, MaxPipelineBytes)
	}
	if err := checkText("config.name", c.GetName(), MaxText); err != nil {
		return err
	}
	if err := checkText("config.description", c.GetDescription(), MaxLongText); err != nil {
		return err
	}
	return checkLabels("config.metadata", c.GetMetadata())
}

func checkCommitOffset(source string, ts *timestamppb.Timestamp) error {
	if err := checkID("source_id", source); err != nil {
		return err
	}
	return checkTimestamp("timestamp", ts)
}

func checkWatermark(w *commonpb.Watermark) error {
	if w == nil {
		return invalid("watermark", "is missing")
	}
	if err := checkID("watermark.source_id", w.SourceId); err != nil {
		return err
	}
	return checkTimestamp("watermark.timestamp", w.Timestamp)
}

func checkGroupOffset(group, source, service string, ts *timestamppb.Timestamp) error {
	if err := checkID("group_id", group); err != nil {
		return err
	}
	if err := checkOptionalID("service_id", service); err != nil {
		return err
	}
	return checkCommitOffset(source, ts)
}

func checkCheckpoint(service, id string, data []byte) error {
	if err := checkID("service_id", service); err != nil {
		return err
	}
	if err := checkOptionalID("checkpoint_id", id); err != nil {
		return err
	}
	if len(data) > MaxCheckpointBytes {
		return invalid("data", "%d bytes, the limit is %d; keep large state elsewhere and save where it is", len(data), MaxCheckpointBytes)
	}
	return nil
}

func checkCheckpointOffsets(m map[string]*checkpointpb.PartitionOffsets) error {
	n := 0
	for source, ps := range m {
		if err := checkID("source_offsets", source); err != nil {
			return err
		}
		n += len(ps.GetOffsets())
	}
	if n > MaxCheckpointOffsets {
		return invalid("source_offsets", "%d offsets, the limit is %d", n, MaxCheckpointOffsets)
	}
	return nil
}

// checkCommitOps checks a batch and answers which operation is at fault.
func checkCommitOps(ops []*clusterpb.CommitOp) (int, error) {
	if len(ops) == 0 {
		return 0, invalid("ops", "the batch is empty")
	}
	if len(ops) > MaxBatchOps {
		return 0, invalid("ops", "%d operations, the limit is %d", len(ops), MaxBatchOps)
	}
	for i, op := range ops {
		if err := checkCommitOp(op); err != nil {
			return i, err
		}
	}
	return 0, nil
}

func checkCommitOp(op *clusterpb.CommitOp) error {
	switch v := op.GetOp().(type) {
	case *clusterpb.CommitOp_Offset:
		return checkCommitOffset(v.Offset.GetSourceId(), v.Offset.GetTimestamp())
	case *clusterpb.CommitOp_Watermark:
		return checkWatermark(v.Watermark.GetWatermark())
	case *clusterpb.CommitOp_GroupOffset:
		o := v.GroupOffset
		return checkGroupOffset(o.GetGroupId(), o.GetSourceId(), o.GetServiceId(), o.GetTimestamp())
	case *clusterpb.CommitOp_Checkpoint:
		o := v.Checkpoint
		return checkCheckpoint(o.GetServiceId(), o.GetCheckpointId(), o.GetData())
	default:
		return invalid("ops", "an operation is empty or of a kind this version does not know")
	}
}
