package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"golang.org/x/term"
)

// terminal reports whether somebody looks at, or types into, stream.
func terminal(stream any) bool {
	f, ok := stream.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// confirm asks a yes-or-no question; anything but yes is an error, and so is
// nobody being there to ask.
func (a *app) confirm(ctx context.Context, question string) error {
	answer, err := a.ask(ctx, question, "[y/N]")
	if err != nil {
		return err
	}
	switch strings.ToLower(answer) {
	case "y", "yes":
		return nil
	}
	return errors.New("nothing was changed")
}

// ask puts a question to whoever is at the terminal and returns the answer,
// without the space around it. The question is printed only where somebody reads
// it: in a log it would be half a line. An answer that a script pipes in counts;
// when it does not come, the command says what it waits for.
func (a *app) ask(ctx context.Context, question, choice string) (string, error) {
	shown := terminal(a.stderr) && terminal(a.stdin)
	if shown {
		fmt.Fprintf(a.stderr, "%s %s ", question, choice)
	} else {
		notice := time.AfterFunc(noticeAfter, func() {
			a.notice("waiting for an answer on standard input: %s %s (--yes goes on without asking)", question, choice)
		})
		defer notice.Stop()
	}
	type read struct {
		line string
		err  error
	}
	got := make(chan read, 1)
	// It is left behind when ctx ends first; then the process ends too.
	go func() {
		line, err := bufio.NewReader(io.LimitReader(a.stdin, 1<<10)).ReadString('\n')
		got <- read{line, err}
	}()
	var r read
	select {
	case r = <-got:
	case <-ctx.Done():
		r.err = ctx.Err()
	}
	if r.err != nil && shown {
		fmt.Fprintln(a.stderr) // nobody has ended the line of the question
	}
	switch {
	case ctx.Err() != nil:
		return "", errors.New("nothing was changed: interrupted")
	case r.err != nil && r.line == "":
		return "", errors.New("nothing was changed: nobody answered; give --yes to go on without asking")
	}
	return strings.TrimSpace(r.line), nil
}
