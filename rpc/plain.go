package rpc

import "regexp"

// ornaments are what errors carry for those who read the source: the package
// that made them, where a sentence begins, and the wrapping of gRPC.
var ornaments = regexp.MustCompile(`(^|: |; |, |\(|\n)(?:(?:archive|backup|bench|client|control|datadir|memlog|raftnode|recovery|router|rpc|server|shelf|snap|wal): |rpc error: code = [A-Za-z]+ desc = )+`)

// Plain returns the text of an error as users read it: without the names of
// packages, which help nobody who does not have the source at hand.
func Plain(text string) string { return ornaments.ReplaceAllString(text, "$1") }
