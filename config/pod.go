package config

import (
	"fmt"
	"net"
	"strconv"
	"strings"
)

// maxReplicas bounds what a pod derives its peers from: more voters make a
// group slower and no safer.
const maxReplicas = 9

// derive returns the settings a pod of a StatefulSet implies when nothing gave
// it a node id. The operator starts the router without arguments; POD_NAME,
// REPLICAS, HEADLESS_SERVICE and NAMESPACE are all it says.
//
// The node id is the pod's ordinal plus one, because 0 is no raft id.
func derive(env variables, given func(key string) bool, faults *Faults) map[string]entry {
	pod := env["POD_NAME"]
	if pod == "" || given("node_id") {
		return nil
	}
	// A pod of something else, or a workstation with such a variable, is not
	// a member of a StatefulSet of routers.
	if env["HEADLESS_SERVICE"] == "" && env["REPLICAS"] == "" {
		return nil
	}
	dash := strings.LastIndexByte(pod, '-')
	ordinal, ok := uint64(0), false
	if dash > 0 {
		ordinal, ok = number(pod[dash+1:])
	}
	if !ok {
		faults.add("env POD_NAME", "node_id", "%q does not end in the ordinal of a StatefulSet pod, such as router-0", pod)
		return nil
	}
	replicas, ok := number(env["REPLICAS"])
	if !ok || replicas == 0 || replicas > maxReplicas {
		faults.add("env REPLICAS", "node_id", "%q is not a number from 1 to %d", env["REPLICAS"], maxReplicas)
		return nil
	}
	if ordinal >= replicas {
		faults.add("env POD_NAME", "node_id", "pod %q is beyond the %d replicas of REPLICAS", pod, replicas)
		return nil
	}
	service := env["HEADLESS_SERVICE"]
	if service == "" && replicas > 1 {
		faults.add("env HEADLESS_SERVICE", "node_id", "is missing: the names of the other pods follow from it")
		return nil
	}
	from := "pod " + pod
	one := func(text string) entry { return entry{where: from, texts: []string{text}} }
	out := map[string]entry{
		"node_id":     one(strconv.FormatUint(ordinal+1, 10)),
		"listen_addr": one("0.0.0.0:50051"),
		"raft_addr":   one("0.0.0.0:50052"),
		"data_dir":    one("/data"),
	}
	if cluster := env["CLUSTER_NAME"]; cluster != "" {
		// Clusters of two namespaces may share a name and must not be mixed up.
		if ns := env["NAMESPACE"]; ns != "" {
			cluster = ns + "/" + cluster
		}
		out["cluster_name"] = one(cluster)
	}
	if service == "" {
		return out
	}
	host := func(n uint64) string {
		h := fmt.Sprintf("%s-%d.%s", pod[:dash], n, service)
		if ns := env["NAMESPACE"]; ns != "" {
			h += "." + ns + ".svc"
		}
		return h
	}
	list := entry{where: from}
	for n := range replicas {
		list.texts = append(list.texts, fmt.Sprintf("%d:%s", n+1, net.JoinHostPort(host(n), "50052")))
	}
	out["peers"] = list
	out["advertise_addr"] = one(net.JoinHostPort(host(ordinal), "50051"))
	return out
}
