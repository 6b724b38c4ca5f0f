package main

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
)

// pipelineVersion is a pipeline's version as people read and write it: 5, or 5@2
// once the state was restored from a backup. A restore may give a pipeline the
// same version again with another content, so that from then on a version without
// its restore epoch does not say what was read.
type pipelineVersion struct {
	version uint64
	epoch   *uint64 // nil: not said
}

// shownVersion returns a version as pipeline get shows it.
func shownVersion(version, epoch uint64) string {
	if epoch == 0 {
		return strconv.FormatUint(version, 10)
	}
	return fmt.Sprintf("%d@%d", version, epoch)
}

// String implements pflag.Value.
func (v *pipelineVersion) String() string {
	if v.epoch != nil {
		return fmt.Sprintf("%d@%d", v.version, *v.epoch)
	}
	return strconv.FormatUint(v.version, 10)
}

// Set implements pflag.Value.
func (v *pipelineVersion) Set(s string) error {
	number, epoch, named := strings.Cut(s, "@")
	n, err := strconv.ParseUint(number, 10, 64)
	if err != nil {
		return errors.New("must be a version as 'router pipeline get' shows it, such as 5, or 5@2 with the restore epoch")
	}
	v.version, v.epoch = n, nil
	if named {
		e, err := strconv.ParseUint(epoch, 10, 64)
		if err != nil {
			return errors.New("what follows the @ must be a restore epoch, as 'router pipeline get' shows it")
		}
		v.epoch = &e
	}
	return nil
}

// Type implements pflag.Value.
func (v *pipelineVersion) Type() string { return "version" }

const ifVersion = "if-version"

func (v *pipelineVersion) add(cmd *cobra.Command, more string) {
	cmd.Flags().Var(v, ifVersion, "only if this is the pipeline's current version, as pipeline get shows it"+more)
}

// expected returns what a command about count pipelines insists on, nil for
// nothing.
func (v *pipelineVersion) expected(cmd *cobra.Command, count int) (version, epoch *uint64, err error) {
	if !cmd.Flags().Changed(ifVersion) {
		return nil, nil, nil
	}
	if count > 1 {
		return nil, nil, usageError{cmd, errors.New("--if-version is about one pipeline; name only one")}
	}
	return &v.version, v.epoch, nil
}
