package manifest

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// resource is one Source, Transform, Sink or Pipeline.
type resource struct {
	kind      string
	namespace string
	name      string
	labels    map[string]string
	where     string
	spec      *pipelineSpec // of a Pipeline
}

func (r *resource) key() string { return r.kind + " " + r.namespace + "/" + r.name }

type reference struct {
	name  string
	where string
}

type pipelineSpec struct {
	source  reference
	steps   []reference
	sink    reference
	dlqSink *reference
	enabled bool
}

// resourceReader reads the documents of the resource form.
type resourceReader struct {
	doc      document
	faults   *Faults
	warnings *Faults
}

var resourceKinds = []string{"Source", "Transform", "Sink", "Pipeline"}

// fields is a mapping being read: what was not asked for is left over and
// becomes a warning.
type fields struct {
	r    *resourceReader
	what string
	node *yaml.Node
	left map[string]*yaml.Node
}

func (r *resourceReader) mapping(n *yaml.Node, what string) (*fields, bool) {
	n = resolve(n)
	if n.Kind != yaml.MappingNode {
		r.faults.add(r.doc.at(n), "%s must hold fields and values", what)
		return nil, false
	}
	f := &fields{r: r, what: what, node: n, left: map[string]*yaml.Node{}}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key := n.Content[i]
		if _, twice := f.left[key.Value]; twice {
			r.faults.add(r.doc.at(key), "%s: %s is set twice", what, key.Value)
			continue
		}
		f.left[key.Value] = resolve(n.Content[i+1])
	}
	return f, true
}

// take returns the value of a field and crosses it off; nil when absent or null.
func (f *fields) take(name string) *yaml.Node {
	n := f.left[name]
	delete(f.left, name)
	if n == nil || isNull(n) {
		return nil
	}
	return n
}

func (f *fields) text(name string, required bool) (string, string) {
	n := f.take(name)
	if n == nil {
		if required {
			f.r.faults.add(f.r.doc.at(f.node), "%s: %s is missing", f.what, name)
		}
		return "", f.r.doc.at(f.node)
	}
	where := f.r.doc.at(n)
	if n.Kind != yaml.ScalarNode || (n.Tag != "!!str" && n.Tag != "!!int") {
		f.r.faults.add(where, "%s: %s must be a text", f.what, name)
		return "", where
	}
	if required && strings.TrimSpace(n.Value) == "" {
		f.r.faults.add(where, "%s: %s must not be empty", f.what, name)
	}
	return n.Value, where
}

func (f *fields) boolean(name string, def bool) bool {
	n := f.take(name)
	if n == nil {
		return def
	}
	if n.Kind != yaml.ScalarNode || n.Tag != "!!bool" {
		f.r.faults.add(f.r.doc.at(n), "%s: %s must be true or false", f.what, name)
		return def
	}
	return strings.EqualFold(n.Value, "true")
}

func (f *fields) wholeNumber(name string) {
	n := f.take(name)
	if n == nil {
		return
	}
	if _, err := strconv.ParseUint(n.Value, 10, 64); n.Kind != yaml.ScalarNode || err != nil {
		f.r.faults.add(f.r.doc.at(n), "%s: %s must be a whole number", f.what, name)
	}
}

func (f *fields) stringMap(name string) map[string]string {
	n := f.take(name)
	if n == nil {
		return nil
	}
	if n.Kind != yaml.MappingNode {
		f.r.faults.add(f.r.doc.at(n), "%s: %s must hold names and values", f.what, name)
		return nil
	}
	out := make(map[string]string, len(n.Content)/2)
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, val := n.Content[i], resolve(n.Content[i+1])
		if val.Kind != yaml.ScalarNode || val.Tag != "!!str" {
			f.r.faults.add(f.r.doc.at(val), "%s: %s: the value of %q must be a text; quote it", f.what, name, key.Value)
			continue
		}
		out[key.Value] = val.Value
	}
	return out
}

// rest warns about the fields nobody asked for.
func (f *fields) rest() {
	for i := 0; i+1 < len(f.node.Content); i += 2 {
		key := f.node.Content[i]
		if _, unused := f.left[key.Value]; unused {
			f.r.warnings.add(f.r.doc.at(key), "%s: unknown field %q is ignored", f.what, key.Value)
			delete(f.left, key.Value)
		}
	}
}

// read returns the resource of a document, nil when it has faults.
func (r *resourceReader) read() *resource {
	before := len(*r.faults)
	top, ok := r.mapping(r.doc.node, "the document")
	if !ok {
		return nil
	}
	kind, where := top.text("kind", true)
	if kind != "" && !slices.Contains(resourceKinds, kind) {
		r.faults.add(where, "unknown kind %q; known are %s and PipelineConfig", kind, strings.Join(resourceKinds, ", "))
		return nil
	}
	res := &resource{kind: kind, where: r.doc.at(r.doc.node), namespace: "default"}
	top.what = kind
	top.text("apiVersion", true)
	if n := top.take("metadata"); n == nil {
		r.faults.add(res.where, "%s: metadata is missing", kind)
	} else if meta, ok := r.mapping(n, kind+" metadata"); ok {
		res.name, _ = meta.text("name", true)
		if ns, _ := meta.text("namespace", false); ns != "" {
			res.namespace = ns
		}
		res.labels = meta.stringMap("labels")
		meta.stringMap("annotations")
		meta.rest()
	}
	if strings.ContainsRune(res.name, '/') || strings.ContainsRune(res.namespace, '/') {
		r.faults.add(res.where, "%s %s/%s: a name must not contain '/'", kind, res.namespace, res.name)
	}
	what := fmt.Sprintf("%s %s/%s", kind, res.namespace, res.name)
	if n := top.take("spec"); n == nil {
		r.faults.add(res.where, "%s: spec is missing", what)
	} else if spec, ok := r.mapping(n, what); ok {
		if kind == "Pipeline" {
			res.spec = r.pipeline(spec, what)
		} else {
			r.endpoint(spec, what)
		}
		spec.rest()
	}
	top.take("status") // written by Kubernetes
	top.rest()
	if len(*r.faults) > before {
		return nil
	}
	return res
}

func (r *resourceReader) pipeline(spec *fields, what string) *pipelineSpec {
	ref := func(f *fields, name string) reference {
		text, where := f.text(name, true)
		return reference{text, where}
	}
	p := &pipelineSpec{source: ref(spec, "source"), sink: ref(spec, "sink"), enabled: spec.boolean("enabled", true)}
	if n := spec.take("steps"); n != nil {
		if n.Kind != yaml.SequenceNode {
			r.faults.add(r.doc.at(n), "%s: steps must be a list of Transform names", what)
		} else {
			for _, item := range n.Content {
				item = resolve(item)
				if item.Kind != yaml.ScalarNode || strings.TrimSpace(item.Value) == "" {
					r.faults.add(r.doc.at(item), "%s: each of steps must be the name of a Transform", what)
					continue
				}
				p.steps = append(p.steps, reference{item.Value, r.doc.at(item)})
			}
		}
	}
	if n := spec.take("dlq"); n != nil {
		if dlq, ok := r.mapping(n, what+" dlq"); ok {
			sink := ref(dlq, "sink")
			p.dlqSink = &sink
			dlq.wholeNumber("maxRetries")
			dlq.wholeNumber("retryBackoffMs")
			dlq.wholeNumber("maxRetryBackoffMs")
			dlq.rest()
		}
	}
	return p
}

// endpoint checks the spec of a Source, Transform or Sink. The router needs
// nothing of it but that it exists: sidecars find the services themselves.
func (r *resourceReader) endpoint(spec *fields, what string) {
	spec.take("config") // any value
	n := spec.take("grpc")
	if n == nil {
		r.faults.add(r.doc.at(spec.node), "%s: grpc is missing", what)
		return
	}
	grpc, ok := r.mapping(n, what+" grpc")
	if !ok {
		return
	}
	grpc.text("endpoint", true)
	grpc.text("proto", false)
	if n := grpc.take("tls"); n != nil {
		if tls, ok := r.mapping(n, what+" grpc.tls"); ok {
			tls.text("caCert", false)
			tls.text("clientCert", false)
			tls.text("clientKey", false)
			tls.boolean("insecureSkipVerify", false)
			tls.rest()
		}
	}
	grpc.rest()
}
