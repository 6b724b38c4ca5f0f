// Package config turns flags, environment and a YAML file into the settings of
// one node, and says for every setting where its value came from.
//
// It is a package of its own, and not part of the command, so that the tests,
// the demo cluster and the serve command read settings by the same rules.
//
// For every setting the first of these that has a value wins:
//
//  1. the flag
//  2. the environment variable CONVEYOR_ROUTER_<KEY>, dots as underscores
//  3. for the keys the original router had: ETL_ROUTER__<SECTION>__<KEY>
//  4. the YAML file
//  5. in a StatefulSet without a node id: what the pod's name implies
//  6. the default
//
// Nothing is guessed: an unknown key, a value that does not parse, a malformed
// peer or two values that contradict each other refuse to start. All faults
// are reported at once, each with the flag, the variable, or the file and line
// it stands in.
package config
