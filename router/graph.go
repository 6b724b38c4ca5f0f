package router

import (
	"fmt"
	"regexp"
	"slices"
	"strings"

	"conveyor.etl/router/router/commandpb"
)

// maxConditionDepth bounds nested conditions.
const maxConditionDepth = 32

// ValidatePipeline returns every fault of a pipeline, each beginning with the
// name of its kind; none means that it is valid. It is for the proposer: apply
// checks only what protects the state.
func ValidatePipeline(spec *commandpb.PipelineSpec) []string {
	g := &graphCheck{stages: map[string]*commandpb.Stage{}, out: map[string][]string{}, in: map[string][]string{}}
	if spec == nil {
		return []string{"MissingSpec: there is no pipeline"}
	}
	if why := CheckID(spec.Id); why != "" {
		g.fault("InvalidID", "pipeline id %s", why)
	}
	g.text("pipeline name", spec.Name)
	g.text("pipeline description", spec.Description)
	if r := checkMap("metadata", spec.Metadata); r != nil {
		g.fault("InvalidMetadata", "%s", r.Reason)
	}
	if len(spec.Stages) == 0 {
		g.fault("NoStages", "the pipeline has no stages")
	}
	if len(spec.Stages) > maxStages {
		g.fault("TooManyStages", "%d stages, at most %d are allowed", len(spec.Stages), maxStages)
	}
	if len(spec.Edges) > maxEdges {
		g.fault("TooManyEdges", "%d edges, at most %d are allowed", len(spec.Edges), maxEdges)
	}
	// Beyond the limits nothing else is checked: the answer would be as large
	// as the input.
	if len(spec.Stages) > maxStages || len(spec.Edges) > maxEdges {
		return g.faults
	}
	for i, s := range spec.Stages {
		g.stage(i, s)
	}
	for i, e := range spec.Edges {
		g.edge(i, e)
	}
	for _, s := range spec.Stages {
		for _, r := range s.GetRoutingRules() {
			for _, target := range r.GetTargetStages() {
				if g.stages[target] == nil {
					g.fault("MissingStage", "rule %q of stage %q targets the unknown stage %q", r.GetName(), s.Id, target)
				}
			}
		}
	}
	if len(spec.Stages) > 0 {
		g.connections()
	}
	return g.faults
}

type graphCheck struct {
	faults  []string
	stages  map[string]*commandpb.Stage
	order   []string // distinct stage ids as given
	out, in map[string][]string
}

func (g *graphCheck) fault(kind, format string, args ...any) {
	g.faults = append(g.faults, kind+": "+fmt.Sprintf(format, args...))
}

func (g *graphCheck) text(what, s string) {
	if r := checkText(what, s); r != nil {
		g.fault("InvalidText", "%s", r.Reason)
	}
}

func (g *graphCheck) stage(i int, s *commandpb.Stage) {
	id := s.GetId()
	switch why := CheckID(id); {
	case id == "":
		g.fault("EmptyStageID", "stage %d has no id", i+1)
	case why != "":
		g.fault("InvalidID", "id of stage %d %s", i+1, why)
	case g.stages[id] != nil:
		g.fault("DuplicateStage", "stage id %q is used more than once", id)
	default:
		g.stages[id] = s
		g.order = append(g.order, id)
	}
	switch s.GetType() {
	case commandpb.StageType_STAGE_TYPE_SOURCE, commandpb.StageType_STAGE_TYPE_TRANSFORM, commandpb.StageType_STAGE_TYPE_SINK:
	default:
		g.fault("UnknownStageType", "stage %q has type %d; source, transform or sink are known", id, s.GetType())
	}
	if s.GetParallelism() > maxParallelism {
		g.fault("InvalidParallelism", "stage %q has parallelism %d, at most %d is allowed", id, s.GetParallelism(), maxParallelism)
	}
	where := fmt.Sprintf("stage %q", id)
	g.text("name of "+where, s.GetName())
	sel := s.GetSelector()
	g.text("service name of "+where, sel.GetServiceName())
	g.text("group of "+where, sel.GetGroupId())
	if r := checkMap("selector labels", sel.GetLabels()); r != nil {
		g.fault("InvalidSelector", "%s: %s", where, r.Reason)
	}
	if _, ok := commandpb.LoadBalance_name[int32(sel.GetLoadBalance())]; !ok {
		g.fault("InvalidSelector", "%s: unknown load balancing %d", where, sel.GetLoadBalance())
	}
	for j, r := range s.GetRoutingRules() {
		rule := fmt.Sprintf("rule %d of %s", j+1, where)
		g.text("name of "+rule, r.GetName())
		g.condition(rule, r.GetCondition(), 0)
	}
}

func (g *graphCheck) edge(i int, e *commandpb.Edge) {
	from, to := e.GetFromStage(), e.GetToStage()
	known := true
	for _, end := range []string{from, to} {
		if g.stages[end] == nil {
			g.fault("MissingStage", "edge %d (%q to %q) names the unknown stage %q", i+1, from, to, end)
			known = false
			if from == to {
				break
			}
		}
	}
	g.condition(fmt.Sprintf("edge %d (%q to %q)", i+1, from, to), e.GetCondition(), 0)
	switch {
	case !known:
	case from == to:
		g.fault("SelfLoop", "stage %q has an edge to itself", from)
	case slices.Contains(g.out[from], to):
		g.fault("DuplicateEdge", "the edge from %q to %q is given more than once", from, to)
	default:
		g.out[from] = append(g.out[from], to)
		g.in[to] = append(g.in[to], from)
	}
}

func (g *graphCheck) condition(where string, c *commandpb.Condition, depth int) {
	if depth > maxConditionDepth {
		g.fault("InvalidCondition", "%s: conditions are nested deeper than %d", where, maxConditionDepth)
		return
	}
	switch x := c.GetCondition().(type) {
	case *commandpb.Condition_Always:
		g.text("condition of "+where, x.Always)
	case *commandpb.Condition_RecordType:
		g.text("record type of "+where, x.RecordType)
	case *commandpb.Condition_Expression:
		g.text("expression of "+where, x.Expression)
	case *commandpb.Condition_MetadataMatch:
		m := x.MetadataMatch
		g.text("metadata key of "+where, m.GetKey())
		g.text("pattern of "+where, m.GetPattern())
		if m.GetKey() == "" {
			g.fault("InvalidCondition", "%s: the metadata key is empty", where)
		}
		if _, err := regexp.Compile(m.GetPattern()); err != nil {
			g.fault("InvalidCondition", "%s: the pattern is no regular expression: %v", where, err)
		}
	case *commandpb.Condition_And:
		for _, sub := range x.And.GetConditions() {
			g.condition(where, sub, depth+1)
		}
	case *commandpb.Condition_Or:
		for _, sub := range x.Or.GetConditions() {
			g.condition(where, sub, depth+1)
		}
	case *commandpb.Condition_Not:
		if x.Not == nil {
			g.fault("InvalidCondition", "%s: nothing to negate", where)
		}
		g.condition(where, x.Not, depth+1)
	}
}

// connections checks what only shows in the whole graph.
func (g *graphCheck) connections() {
	var sources, sinks []string
	for _, id := range g.order {
		switch g.stages[id].Type {
		case commandpb.StageType_STAGE_TYPE_SOURCE:
			sources = append(sources, id)
		case commandpb.StageType_STAGE_TYPE_SINK:
			sinks = append(sinks, id)
		}
	}
	if cycle := g.cycle(); cycle != nil {
		g.fault("CycleDetected", "%s", strings.Join(cycle, " -> "))
	}
	if len(sources) == 0 {
		g.fault("NoSourceStages", "the pipeline has no source")
	}
	if len(sinks) == 0 {
		g.fault("NoSinkStages", "the pipeline has no sink")
	}
	fed, drained := reach(sources, g.out), reach(sinks, g.in)
	for _, id := range g.order {
		source := g.stages[id].Type == commandpb.StageType_STAGE_TYPE_SOURCE
		sink := g.stages[id].Type == commandpb.StageType_STAGE_TYPE_SINK
		switch {
		case source && len(g.out[id]) == 0:
			g.fault("DisconnectedStage", "source %q leads nowhere", id)
		case sink && len(g.in[id]) == 0:
			g.fault("DisconnectedStage", "nothing leads to sink %q", id)
		case !source && !sink && len(g.in[id])+len(g.out[id]) == 0:
			g.fault("DisconnectedStage", "stage %q has no edges", id)
		}
		if !source && !fed[id] {
			g.fault("UnreachableFromSource", "no source leads to stage %q", id)
		}
		if !sink && !drained[id] {
			g.fault("CannotReachSink", "stage %q leads to no sink", id)
		}
	}
}

// reach returns everything the edges lead to from the given stages.
func reach(from []string, edges map[string][]string) map[string]bool {
	seen := map[string]bool{}
	todo := slices.Clone(from)
	for len(todo) > 0 {
		id := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		if seen[id] {
			continue
		}
		seen[id] = true
		todo = append(todo, edges[id]...)
	}
	return seen
}

// cycle returns the stages of one cycle, the first repeated at the end. Stages
// and edges are taken as given, so the answer is always the same.
func (g *graphCheck) cycle() []string {
	const (
		open = 1
		done = 2
	)
	state := map[string]int{}
	var path []string
	var visit func(id string) []string
	visit = func(id string) []string {
		state[id] = open
		path = append(path, id)
		for _, to := range g.out[id] {
			switch state[to] {
			case open:
				return append(slices.Clone(path[slices.Index(path, to):]), to)
			case done:
				continue
			}
			if c := visit(to); c != nil {
				return c
			}
		}
		state[id] = done
		path = path[:len(path)-1]
		return nil
	}
	for _, id := range g.order {
		if state[id] == 0 {
			if c := visit(id); c != nil {
				return c
			}
		}
	}
	return nil
}

// deepConditions reports conditions nested beyond the limit. Apply asks before
// it encodes a spec: the encoder recurses, and a few megabytes of nested "not"
// would take the stack of every replica.
func deepConditions(spec *commandpb.PipelineSpec) bool {
	for _, e := range spec.GetEdges() {
		if tooDeep(e.GetCondition(), 0) {
			return true
		}
	}
	for _, s := range spec.GetStages() {
		for _, r := range s.GetRoutingRules() {
			if tooDeep(r.GetCondition(), 0) {
				return true
			}
		}
	}
	return false
}

func tooDeep(c *commandpb.Condition, depth int) bool {
	if depth > maxConditionDepth {
		return true
	}
	list := c.GetAnd().GetConditions()
	if list == nil {
		list = c.GetOr().GetConditions()
	}
	if not := c.GetNot(); not != nil {
		return tooDeep(not, depth+1)
	}
	for _, sub := range list {
		if tooDeep(sub, depth+1) {
			return true
		}
	}
	return false
}
