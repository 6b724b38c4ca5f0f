// Package output renders what a command found: as a table for people, or as a
// JSON or YAML document for programs. It is a package of its own, and not part
// of the commands, because the demo and bench commands print through it too.
//
// Documents of protobuf messages keep the field order and the field names of
// the .proto file, have numbers as numbers and end with a newline (see Message); a
// list is one document. Tables go
// through text/tabwriter without borders, so that cut and awk work on them.
package output
