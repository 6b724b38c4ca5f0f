package main

import (
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"
)

// when shows a time of the cluster; a dash when it never was.
func when(t *timestamppb.Timestamp) string {
	if t == nil || t.GetSeconds() == 0 {
		return "-"
	}
	return t.AsTime().UTC().Format(time.RFC3339)
}

func yesNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

// short makes "STAGE_TYPE_SOURCE" into "source".
func short(enum, prefix string) string {
	return strings.ToLower(strings.TrimPrefix(enum, prefix))
}

// orDash shows a text that may be empty.
func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
