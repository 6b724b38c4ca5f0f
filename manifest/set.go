package manifest

import (
	"fmt"
	"io"

	"go.yaml.in/yaml/v3"

	"conveyor.etl/router/rpc/routerpb/adminpb"
)

// Set is what a group of files declares.
type Set struct {
	// Pipelines are the declared pipelines in the order of the files.
	Pipelines []Pipeline
	// Warnings are oddities that do not hinder the use of the files.
	Warnings Faults

	resources map[string]*resource
	order     []*resource
}

// Pipeline is one declared pipeline.
type Pipeline struct {
	Config *adminpb.PipelineConfig
	// Where is FILE:LINE.
	Where string
}

// Load reads the files and folders of paths ("-" is stdin). Its error is of
// type Faults and lists everything that cannot be understood; references
// between resources are checked by CheckReferences.
func Load(paths []string, stdin io.Reader) (*Set, error) {
	var faults Faults
	s := &Set{resources: map[string]*resource{}}
	ids := map[string]string{}
	declare := func(p Pipeline) {
		if first, twice := ids[p.Config.GetId()]; twice {
			faults.add(p.Where, "pipeline %s is declared twice; first at %s", p.Config.GetId(), first)
			return
		}
		ids[p.Config.GetId()] = p.Where
		s.Pipelines = append(s.Pipelines, p)
	}
	for _, doc := range readAll(paths, stdin, &faults) {
		if isConfig(doc.node) {
			if p, ok := readConfig(doc, &faults); ok {
				declare(p)
			}
			continue
		}
		r := (&resourceReader{doc: doc, faults: &faults, warnings: &s.Warnings}).read()
		if r == nil {
			continue
		}
		if first, twice := s.resources[r.key()]; twice {
			faults.add(r.where, "%s is declared twice; first at %s", r.key(), first.where)
			continue
		}
		s.resources[r.key()] = r
		s.order = append(s.order, r)
		if r.kind == "Pipeline" {
			declare(Pipeline{Config: pipelineConfig(r), Where: r.where})
		}
	}
	if err := faults.err(); err != nil {
		return nil, err
	}
	return s, nil
}

// CheckReferences reports, all at once, every Source, Transform or Sink a
// Pipeline names that no file declares. Names are looked up in the pipeline's
// own namespace.
func (s *Set) CheckReferences() error {
	var faults Faults
	for _, r := range s.order {
		if r.spec == nil {
			continue
		}
		need := func(kind, word string, ref reference) {
			if s.resources[kind+" "+r.namespace+"/"+ref.name] == nil {
				faults.add(ref.where, "pipeline '%s': %s '%s' not found in namespace '%s'", r.name, word, ref.name, r.namespace)
			}
		}
		need("Source", "source", r.spec.source)
		for _, step := range r.spec.steps {
			need("Transform", "transform", step)
		}
		need("Sink", "sink", r.spec.sink)
		if r.spec.dlqSink != nil {
			need("Sink", "DLQ sink", *r.spec.dlqSink)
		}
	}
	return faults.err()
}

// Resources returns how many resources besides pipelines were declared.
func (s *Set) Resources() int {
	n := 0
	for _, r := range s.order {
		if r.kind != "Pipeline" {
			n++
		}
	}
	return n
}

// pipelineConfig maps a Pipeline the way the Kubernetes operator does, name for
// name: either of them may apply the same pipeline next.
func pipelineConfig(r *resource) *adminpb.PipelineConfig {
	c := &adminpb.PipelineConfig{
		Id:       r.namespace + "/" + r.name,
		Name:     r.name,
		Enabled:  r.spec.enabled,
		Metadata: r.labels,
	}
	add := func(id, service string, t adminpb.StageType) {
		if n := len(c.Stages); n > 0 {
			c.Edges = append(c.Edges, &adminpb.Edge{FromStage: c.Stages[n-1].Id, ToStage: id})
		}
		c.Stages = append(c.Stages, &adminpb.Stage{
			Id: id, Name: service, StageType: t, Parallelism: 1,
			ServiceSelector: &adminpb.ServiceSelector{
				ServiceName: service,
				LoadBalance: adminpb.LoadBalanceStrategy_LOAD_BALANCE_ROUND_ROBIN,
			},
		})
	}
	add(r.name+"-source", r.spec.source.name, adminpb.StageType_STAGE_TYPE_SOURCE)
	for i, step := range r.spec.steps {
		add(fmt.Sprintf("%s-transform-%d", r.name, i), step.name, adminpb.StageType_STAGE_TYPE_TRANSFORM)
	}
	add(r.name+"-sink", r.spec.sink.name, adminpb.StageType_STAGE_TYPE_SINK)
	return c
}

// isConfig tells the whole PipelineConfig from a resource.
func isConfig(n *yaml.Node) bool {
	if n.Kind != yaml.MappingNode {
		return false
	}
	stages, kind := false, ""
	for i := 0; i+1 < len(n.Content); i += 2 {
		switch n.Content[i].Value {
		case "kind":
			kind = n.Content[i+1].Value
		case "stages", "edges":
			stages = true
		}
	}
	return kind == "PipelineConfig" || kind == "" && stages
}

// readConfig reads a whole PipelineConfig: its fields beside apiVersion and
// kind.
func readConfig(doc document, faults *Faults) (Pipeline, bool) {
	before := len(*faults)
	body := &yaml.Node{Kind: yaml.MappingNode, Line: doc.node.Line, Column: doc.node.Column}
	for i := 0; i+1 < len(doc.node.Content); i += 2 {
		switch key := doc.node.Content[i]; key.Value {
		case "apiVersion", "kind":
		default:
			body.Content = append(body.Content, key, doc.node.Content[i+1])
		}
	}
	c := &adminpb.PipelineConfig{}
	(&decoder{doc: doc, faults: faults}).message(body, c.ProtoReflect(), 0)
	if len(*faults) == before && c.Id == "" {
		faults.add(doc.at(doc.node), "PipelineConfig: id is missing")
	}
	return Pipeline{Config: c, Where: doc.at(doc.node)}, len(*faults) == before
}
