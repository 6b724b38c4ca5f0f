//go:build !linux

package background

// lower does nothing: elsewhere priorities are those of whole processes.
func lower() {}
