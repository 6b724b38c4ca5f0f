// Package lint holds the rules of this repository as a test: who may import
// whom, formatting, documentation, and the calls that must not be made. It has
// no code of its own; run it with go test ./internal/lint.
//
// Rules live in a test, not in memory or in a review, and each carries its
// reason, which is what a failure prints. A rule that stands in the way of
// something right is changed here, together with ARCHITECTURE.md.
package lint
