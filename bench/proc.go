package bench

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"time"
)

// userHz is the unit of CPU times in /proc/<pid>/stat: 1/100 s on every Linux
// there is, whatever the kernel's own tick.
const userHz = 100

// Process is a snapshot of what one process has used.
type Process struct {
	CPU      time.Duration // user and system, all threads, since its start
	Resident int64         // bytes
}

// ReadProcess reads what the process pid of this machine has used.
func ReadProcess(pid int) (Process, error) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return Process{}, fmt.Errorf("bench: what process %d used is unknown: %w", pid, err)
	}
	// The command name stands in parentheses and may hold anything; the fields
	// that matter follow the last one.
	fields := bytes.Fields(raw[bytes.LastIndexByte(raw, ')')+1:])
	if len(fields) < 22 {
		return Process{}, fmt.Errorf("bench: /proc/%d/stat has only %d fields", pid, len(fields)+2)
	}
	var p Process
	for _, f := range fields[11:13] { // utime, stime
		n, err := strconv.ParseInt(string(f), 10, 64)
		if err != nil {
			return Process{}, fmt.Errorf("bench: /proc/%d/stat: %w", pid, err)
		}
		p.CPU += time.Duration(n) * (time.Second / userHz)
	}
	pages, err := strconv.ParseInt(string(fields[21]), 10, 64)
	if err != nil {
		return Process{}, fmt.Errorf("bench: /proc/%d/stat: %w", pid, err)
	}
	p.Resident = pages * int64(os.Getpagesize())
	return p, nil
}

// CheckPids returns an error that names those of pids that are no processes of this
// machine, or of which it cannot be read what they use.
func CheckPids(pids []int) error {
	var errs []error
	for _, pid := range pids {
		_, err := ReadProcess(pid)
		if errors.Is(err, fs.ErrNotExist) {
			err = fmt.Errorf("bench: there is no process %d on this machine", pid)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// cpuMeter measures the CPU time that server processes, and this one, use
// during a measurement.
type cpuMeter struct {
	pids    []int
	before  []Process
	after   []Process
	self    Process
	selfEnd Process
	err     error // what one of them used is not known: it has ended
}

func (m *cpuMeter) read(out []Process) []Process {
	for _, pid := range m.pids {
		p, err := ReadProcess(pid)
		if err != nil {
			m.err = err
		}
		out = append(out, p)
	}
	return out
}

func (m *cpuMeter) start(pids []int) {
	m.pids = pids
	m.before = m.read(nil)
	m.self, _ = ReadProcess(os.Getpid()) // without /proc there is no such column
}

func (m *cpuMeter) stop() {
	m.after = m.read(nil)
	m.selfEnd, _ = ReadProcess(os.Getpid())
}

// servers returns the CPU time of each server process.
func (m *cpuMeter) servers() []time.Duration {
	out := make([]time.Duration, len(m.after))
	for i := range m.after {
		out[i] = m.after[i].CPU - m.before[i].CPU
	}
	return out
}
