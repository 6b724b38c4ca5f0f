package rpc

import "regexp"

// ornaments are what errors carry for those who read the source: the package
// that made them, where a sentence begins, and the wrapping of gRPC.
var ornaments = regexp.MustCompile(`(^|: |; |, |\(|\n)(?:(?:archive|backup|bench|client|control|datadir|memlog|offline|raftnode|recovery|router|rpc|server|shelf|snap|wal): |rpc error: code = [A-Za-z]+ desc = )+`)

// transportWords are what gRPC says when a connection fails, and what that means.
var transportWords = []struct {
	words *regexp.Regexp
	plain string
}{
	{regexp.MustCompile(`(?:last connection error: |latest balancer error: )+`), ""},
	{regexp.MustCompile(`connection error: desc = "((?:[^"\\]|\\.)*)"`), "$1"},
	{regexp.MustCompile(`transport: Error while dialing: `), ""},
	{regexp.MustCompile(`dial tcp:? (?:lookup )?`), ""},
	{regexp.MustCompile(`: connect: `), ": "},
	{regexp.MustCompile(`error reading server preface: .*`), "it does not answer as a node does; is that the client address of one?"},
	{regexp.MustCompile(`error reading from server: .*`), "the connection broke"},
	{regexp.MustCompile(`context deadline exceeded`), "no answer in time"},
	{regexp.MustCompile(`context canceled`), "interrupted"},
}

// Plain returns the text of an error as users read it: without the names of
// packages, which help nobody who does not have the source at hand, and without
// gRPC's words for a connection that failed.
func Plain(text string) string {
	text = ornaments.ReplaceAllString(text, "$1")
	for _, t := range transportWords {
		text = t.words.ReplaceAllString(text, t.plain)
	}
	return text
}
