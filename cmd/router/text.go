package main

import (
	"bufio"
	"errors"
	"fmt"
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

// confirm asks a yes-or-no question on the terminal; anything but yes is an
// error, and so is nobody being there to ask.
func (a *app) confirm(question string) error {
	fmt.Fprintf(a.stderr, "%s [y/N] ", question)
	line, err := bufio.NewReader(a.stdin).ReadString('\n')
	switch strings.ToLower(strings.TrimSpace(line)) {
	case "y", "yes":
		return nil
	}
	if err != nil {
		fmt.Fprintln(a.stderr) // nobody has ended the line of the question
	}
	if err != nil && line == "" {
		return errors.New("nothing was changed: nobody answered; give --yes to go on without asking")
	}
	return errors.New("nothing was changed")
}
