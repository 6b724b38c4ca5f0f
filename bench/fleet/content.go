package fleet

import (
	"fmt"
	"strconv"
	"strings"

	"conveyor.etl/router/rpc/routerpb/adminpb"
	"conveyor.etl/router/rpc/routerpb/sidecarpb"
)

// namespace keeps what this package makes apart from what was there.
const namespace = "fleet"

// zoneLabel is the label by which the planner knows where a sidecar runs.
const zoneLabel = "topology.kubernetes.io/zone"

// widePipeline is the pipeline that every watcher runs.
const widePipeline = namespace + "/wide"

// content says what the sidecars offer and the pipelines ask for. Pipeline p
// asks for services that the sidecars i with i modulo pipelines = p offer: all
// three of them in some pods of each such group, source and transform alone in the
// others. So every pipeline has several candidates, some of which keep
// all its edges inside one pod.
type content struct{ sidecars, pipelines, watchers, zones int }

func sidecarID(i int) string { return fmt.Sprintf("%s/pod-%06d", namespace, i) }

// sidecarIndex is sidecarID backwards; false for an id of somebody else.
func sidecarIndex(id string) (int, bool) {
	rest, ok := strings.CutPrefix(id, namespace+"/pod-")
	if !ok {
		return 0, false
	}
	i, err := strconv.Atoi(rest)
	return i, err == nil && i >= 0
}

func pipelineID(p int) string { return fmt.Sprintf("%s/pipeline-%06d", namespace, p) }

// pipelineIndex is pipelineID backwards.
func pipelineIndex(id string) (int, bool) {
	rest, ok := strings.CutPrefix(id, namespace+"/pipeline-")
	if !ok {
		return 0, false
	}
	p, err := strconv.Atoi(rest)
	return p, err == nil && p >= 0
}

// watches says whether sidecar i is one of those that watch. They are spread
// evenly: a zone or a group of pipelines holds its share.
func (c content) watches(i int) bool {
	return (i+1)*c.watchers/c.sidecars > i*c.watchers/c.sidecars
}

func (c content) zone(i int) int { return i / c.pipelines % c.zones }

// registration is what sidecar i registers; life grows with each restart, by
// which its endpoints change as those of a new pod do.
func (c content) registration(i, life int) *sidecarpb.RegisterSidecarRequest {
	host := fmt.Sprintf("10.%d.%d.%d", life%200+1, i>>8&0xff, i&0xff)
	group := i % c.pipelines
	r := &sidecarpb.RegisterSidecarRequest{
		SidecarId: sidecarID(i), PodName: fmt.Sprintf("pod-%06d", i), Namespace: namespace,
		SidecarEndpoint: fmt.Sprintf("%s:%d", host, 20000+i>>16),
		Labels:          map[string]string{zoneLabel: fmt.Sprintf("zone-%d", c.zone(i))},
	}
	add := func(name string, t sidecarpb.ServiceType) {
		r.LocalServices = append(r.LocalServices, &sidecarpb.LocalService{
			ServiceName: name, ServiceType: t, LocalEndpoint: fmt.Sprintf("127.0.0.1:%d", 50100+len(r.LocalServices)),
		})
	}
	add(fmt.Sprintf("source-%d", group), sidecarpb.ServiceType_SERVICE_TYPE_SOURCE)
	add(fmt.Sprintf("transform-%d", group), sidecarpb.ServiceType_SERVICE_TYPE_TRANSFORM)
	if i/c.pipelines/c.zones%2 == 0 {
		add(fmt.Sprintf("sink-%d", group), sidecarpb.ServiceType_SERVICE_TYPE_SINK)
	}
	if c.watches(i) {
		add("wide-source", sidecarpb.ServiceType_SERVICE_TYPE_SOURCE)
		add("wide-sink", sidecarpb.ServiceType_SERVICE_TYPE_SINK)
	}
	return r
}

// pipeline returns pipeline p in one of its forms. Another form has other stage
// ids, so that every sidecar which runs it has to be told.
func (c content) pipeline(p, form int) *adminpb.PipelineConfig {
	return chain(pipelineID(p), form, 1,
		[3]string{fmt.Sprintf("source-%d", p), fmt.Sprintf("transform-%d", p), fmt.Sprintf("sink-%d", p)})
}

// wide returns the pipeline that every watcher runs.
func (c content) wide(form int) *adminpb.PipelineConfig {
	return chain(widePipeline, form, c.watchers, [3]string{"wide-source", "", "wide-sink"})
}

var stageTypes = [3]adminpb.StageType{
	adminpb.StageType_STAGE_TYPE_SOURCE, adminpb.StageType_STAGE_TYPE_TRANSFORM, adminpb.StageType_STAGE_TYPE_SINK,
}

// chain is a pipeline of one stage per service named.
func chain(id string, form, parallelism int, services [3]string) *adminpb.PipelineConfig {
	p := &adminpb.PipelineConfig{Id: id, Name: id, Enabled: true}
	for k, name := range services {
		if name == "" {
			continue
		}
		stage := fmt.Sprintf("stage-%d-%d", k, form)
		if n := len(p.Stages); n > 0 {
			p.Edges = append(p.Edges, &adminpb.Edge{FromStage: p.Stages[n-1].Id, ToStage: stage})
		}
		p.Stages = append(p.Stages, &adminpb.Stage{
			Id: stage, Name: stage, StageType: stageTypes[k], Parallelism: uint32(parallelism),
			ServiceSelector: &adminpb.ServiceSelector{ServiceName: name},
		})
	}
	return p
}
