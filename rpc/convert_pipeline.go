package rpc

import (
	"conveyor.etl/router/router/commandpb"
	"conveyor.etl/router/rpc/routerpb/adminpb"
)

// specFromAPI turns a declared pipeline into what the log carries. It shares
// the maps and strings of c, which must not change afterwards.
func specFromAPI(c *adminpb.PipelineConfig) *commandpb.PipelineSpec {
	spec := &commandpb.PipelineSpec{
		Id:          c.GetId(),
		Name:        c.GetName(),
		Description: c.GetDescription(),
		Enabled:     c.GetEnabled(),
		Metadata:    c.GetMetadata(),
		Stages:      make([]*commandpb.Stage, 0, len(c.GetStages())),
		Edges:       make([]*commandpb.Edge, 0, len(c.GetEdges())),
	}
	for _, st := range c.GetStages() {
		spec.Stages = append(spec.Stages, stageFromAPI(st))
	}
	for _, e := range c.GetEdges() {
		spec.Edges = append(spec.Edges, &commandpb.Edge{
			FromStage: e.GetFromStage(),
			ToStage:   e.GetToStage(),
			Condition: conditionFromAPI(e.GetCondition()),
		})
	}
	return spec
}

func stageFromAPI(st *adminpb.Stage) *commandpb.Stage {
	out := &commandpb.Stage{
		Id:          st.GetId(),
		Name:        st.GetName(),
		Type:        commandpb.StageType(st.GetStageType()),
		Parallelism: st.GetParallelism(),
	}
	if sel := st.GetServiceSelector(); sel != nil {
		out.Selector = &commandpb.ServiceSelector{
			ServiceName: sel.ServiceName,
			GroupId:     sel.GroupId,
			Labels:      sel.Labels,
			LoadBalance: commandpb.LoadBalance(sel.LoadBalance),
		}
	}
	for _, r := range st.GetRoutingRules() {
		out.RoutingRules = append(out.RoutingRules, &commandpb.RoutingRule{
			Name:         r.GetName(),
			Condition:    conditionFromAPI(r.GetCondition()),
			TargetStages: r.GetTargetStages(),
			Priority:     r.GetPriority(),
		})
	}
	return out
}

func conditionFromAPI(c *adminpb.Condition) *commandpb.Condition {
	if c == nil {
		return nil
	}
	out := &commandpb.Condition{}
	switch v := c.GetCondition().(type) {
	case *adminpb.Condition_Always:
		out.Condition = &commandpb.Condition_Always{Always: v.Always}
	case *adminpb.Condition_RecordType:
		out.Condition = &commandpb.Condition_RecordType{RecordType: v.RecordType}
	case *adminpb.Condition_MetadataMatch:
		out.Condition = &commandpb.Condition_MetadataMatch{MetadataMatch: &commandpb.MetadataMatch{
			Key: v.MetadataMatch.GetKey(), Pattern: v.MetadataMatch.GetPattern(),
		}}
	case *adminpb.Condition_Expression:
		out.Condition = &commandpb.Condition_Expression{Expression: v.Expression}
	case *adminpb.Condition_And:
		out.Condition = &commandpb.Condition_And{And: conditionsFromAPI(v.And.GetConditions())}
	case *adminpb.Condition_Or:
		out.Condition = &commandpb.Condition_Or{Or: conditionsFromAPI(v.Or.GetConditions())}
	case *adminpb.Condition_Not:
		inner := conditionFromAPI(v.Not.GetCondition())
		if inner == nil {
			inner = &commandpb.Condition{}
		}
		out.Condition = &commandpb.Condition_Not{Not: inner}
	}
	return out
}

func conditionsFromAPI(cs []*adminpb.Condition) *commandpb.ConditionList {
	out := &commandpb.ConditionList{}
	for _, c := range cs {
		out.Conditions = append(out.Conditions, conditionFromAPI(c))
	}
	return out
}

// configToAPI is the inverse of specFromAPI.
func configToAPI(s *commandpb.PipelineSpec) *adminpb.PipelineConfig {
	out := &adminpb.PipelineConfig{
		Id:          s.GetId(),
		Name:        s.GetName(),
		Description: s.GetDescription(),
		Enabled:     s.GetEnabled(),
		Metadata:    s.GetMetadata(),
		Stages:      make([]*adminpb.Stage, 0, len(s.GetStages())),
		Edges:       make([]*adminpb.Edge, 0, len(s.GetEdges())),
	}
	for _, st := range s.GetStages() {
		out.Stages = append(out.Stages, stageToAPI(st))
	}
	for _, e := range s.GetEdges() {
		out.Edges = append(out.Edges, &adminpb.Edge{
			FromStage: e.GetFromStage(),
			ToStage:   e.GetToStage(),
			Condition: conditionToAPI(e.GetCondition()),
		})
	}
	return out
}

func stageToAPI(st *commandpb.Stage) *adminpb.Stage {
	out := &adminpb.Stage{
		Id:          st.GetId(),
		Name:        st.GetName(),
		StageType:   adminpb.StageType(st.GetType()),
		Parallelism: st.GetParallelism(),
	}
	if sel := st.GetSelector(); sel != nil {
		out.ServiceSelector = &adminpb.ServiceSelector{
			ServiceName: sel.ServiceName,
			GroupId:     sel.GroupId,
			Labels:      sel.Labels,
			LoadBalance: adminpb.LoadBalanceStrategy(sel.LoadBalance),
		}
	}
	for _, r := range st.GetRoutingRules() {
		out.RoutingRules = append(out.RoutingRules, &adminpb.RoutingRule{
			Name:         r.GetName(),
			Condition:    conditionToAPI(r.GetCondition()),
			TargetStages: r.GetTargetStages(),
			Priority:     r.GetPriority(),
		})
	}
	return out
}

func conditionToAPI(c *commandpb.Condition) *adminpb.Condition {
	if c == nil {
		return nil
	}
	out := &adminpb.Condition{}
	switch v := c.GetCondition().(type) {
	case *commandpb.Condition_Always:
		out.Condition = &adminpb.Condition_Always{Always: v.Always}
	case *commandpb.Condition_RecordType:
		out.Condition = &adminpb.Condition_RecordType{RecordType: v.RecordType}
	case *commandpb.Condition_MetadataMatch:
		out.Condition = &adminpb.Condition_MetadataMatch{MetadataMatch: &adminpb.MetadataMatch{
			Key: v.MetadataMatch.GetKey(), Pattern: v.MetadataMatch.GetPattern(),
		}}
	case *commandpb.Condition_Expression:
		out.Condition = &adminpb.Condition_Expression{Expression: v.Expression}
	case *commandpb.Condition_And:
		out.Condition = &adminpb.Condition_And{And: &adminpb.AndCondition{Conditions: conditionsToAPI(v.And.GetConditions())}}
	case *commandpb.Condition_Or:
		out.Condition = &adminpb.Condition_Or{Or: &adminpb.OrCondition{Conditions: conditionsToAPI(v.Or.GetConditions())}}
	case *commandpb.Condition_Not:
		out.Condition = &adminpb.Condition_Not{Not: &adminpb.NotCondition{Condition: conditionToAPI(v.Not)}}
	}
	return out
}

func conditionsToAPI(cs []*commandpb.Condition) []*adminpb.Condition {
	out := make([]*adminpb.Condition, 0, len(cs))
	for _, c := range cs {
		out = append(out, conditionToAPI(c))
	}
	return out
}
