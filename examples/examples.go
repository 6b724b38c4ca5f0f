// Package examples holds the example pipelines, so that a binary away from its
// source tree has them too.
package examples

import "embed"

// Files are the examples.
//
//go:embed *.yaml *.json
var Files embed.FS
