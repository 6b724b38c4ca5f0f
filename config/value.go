package config

import (
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// value parses one setting into its field and shows it again.
type value interface {
	parse(text string) error
	show() string
}

const maxUint = math.MaxUint64

type unsigned struct {
	p        *uint64
	min, max uint64
}

func (v unsigned) parse(text string) error {
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		return fmt.Errorf("%q is not a whole number", text)
	}
	if n < v.min || n > v.max {
		return fmt.Errorf("%d is out of range: %d to %d", n, v.min, v.max)
	}
	*v.p = n
	return nil
}
func (v unsigned) show() string { return strconv.FormatUint(*v.p, 10) }

// span is a duration. A plain number counts in unit unless unit is a
// nanosecond, in which case one has to be written.
type span struct {
	p        *time.Duration
	unit     time.Duration
	min, max time.Duration
}

func (v span) parse(text string) error {
	var d time.Duration
	if n, err := strconv.ParseInt(text, 10, 64); err == nil && v.unit > time.Nanosecond {
		if n > math.MaxInt64/int64(v.unit) || n < 0 {
			return fmt.Errorf("%d is out of range: %s to %s", n, v.min, v.max)
		}
		d = time.Duration(n) * v.unit
	} else if d, err = time.ParseDuration(text); err != nil {
		if v.unit > time.Nanosecond {
			return fmt.Errorf("%q is not a number", text)
		}
		return fmt.Errorf("%q is not a duration such as 500ms, 10s or 5m", text)
	}
	if d < v.min || d > v.max {
		return fmt.Errorf("%s is out of range: %s to %s", d, v.min, v.max)
	}
	*v.p = d
	return nil
}

func (v span) show() string {
	if v.unit > time.Nanosecond && *v.p%v.unit == 0 {
		return strconv.FormatInt(int64(*v.p/v.unit), 10)
	}
	return v.p.String()
}

type bytesI struct {
	p        *int64
	min, max int64
}

func (v bytesI) parse(text string) error {
	n, err := parseBytes(text)
	if err != nil {
		return err
	}
	if n < v.min || n > v.max {
		return fmt.Errorf("%s is out of range: %s to %s", showBytes(n), showBytes(v.min), showBytes(v.max))
	}
	*v.p = n
	return nil
}
func (v bytesI) show() string { return showBytes(*v.p) }

type bytesU struct {
	p        *uint64
	min, max int64
}

func (v bytesU) parse(text string) error {
	var n int64
	if err := (bytesI{&n, v.min, v.max}).parse(text); err != nil {
		return err
	}
	*v.p = uint64(n)
	return nil
}
func (v bytesU) show() string { return showBytes(int64(*v.p)) }

var byteUnits = []struct {
	name string
	size int64
}{{"TiB", 1 << 40}, {"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10}, {"B", 1}, {"", 1}}

func parseBytes(text string) (int64, error) {
	for _, u := range byteUnits {
		digits, ok := strings.CutSuffix(text, u.name)
		if !ok {
			continue
		}
		n, err := strconv.ParseInt(strings.TrimSpace(digits), 10, 64)
		if err != nil || n < 0 || n > math.MaxInt64/u.size {
			break
		}
		return n * u.size, nil
	}
	return 0, fmt.Errorf("%q is not a size such as 65536, 64KiB or 16MiB", text)
}

func showBytes(n int64) string {
	for _, u := range byteUnits[:4] {
		if n >= u.size && n%u.size == 0 {
			return strconv.FormatInt(n/u.size, 10) + u.name
		}
	}
	return strconv.FormatInt(n, 10)
}

type name struct{ p *string }

func (v name) parse(text string) error {
	if text == "" || len(text) > 128 {
		return errors.New("must have 1 to 128 characters")
	}
	for _, r := range text {
		if r <= ' ' || r >= 0x7f {
			return fmt.Errorf("%q holds a character that is not printable ASCII", text)
		}
	}
	*v.p = text
	return nil
}
func (v name) show() string { return *v.p }

type path struct{ p *string }

func (v path) parse(text string) error {
	if text == "" {
		return errors.New("must not be empty")
	}
	*v.p = filepath.Clean(text)
	return nil
}
func (v path) show() string { return *v.p }

// destination is where backups are kept: a directory or the address of a bucket.
type destination struct{ p *string }

func (v destination) parse(text string) error {
	if text == "" || len(text) > 1024 {
		return errors.New("must have 1 to 1024 characters")
	}
	for _, r := range text {
		if r < ' ' || r == 0x7f {
			return fmt.Errorf("%q holds a control character", text)
		}
	}
	*v.p = text
	return nil
}
func (v destination) show() string { return *v.p }

type choice struct {
	p       *string
	allowed []string
}

func (v choice) parse(text string) error {
	if !slices.Contains(v.allowed, text) {
		return fmt.Errorf("%q is not one of %s", text, strings.Join(v.allowed, ", "))
	}
	*v.p = text
	return nil
}
func (v choice) show() string { return *v.p }

type level struct{ p *slog.Level }

func (v level) parse(text string) error {
	switch strings.ToLower(text) {
	case "debug":
		*v.p = slog.LevelDebug
	case "info":
		*v.p = slog.LevelInfo
	case "warn", "warning":
		*v.p = slog.LevelWarn
	case "error":
		*v.p = slog.LevelError
	default:
		return fmt.Errorf("%q is not one of debug, info, warn, error", text)
	}
	return nil
}
func (v level) show() string { return strings.ToLower(v.p.String()) }

// listen is an address to listen on: the host may be empty or unspecified, the
// port may be 0 (any free one).
type listen struct{ p *string }

func (v listen) parse(text string) error {
	if err := isListen(text); err != nil {
		return err
	}
	*v.p = text
	return nil
}
func (v listen) show() string { return *v.p }

// dial is an address others connect to; empty means derived.
type dial struct{ p *string }

func (v dial) parse(text string) error {
	if text != "" {
		if err := isDial(text); err != nil {
			return err
		}
	}
	*v.p = text
	return nil
}
func (v dial) show() string { return *v.p }

// loopback is an address to listen on that only this machine reaches; empty
// means none. Profiles show what is in memory, so no other address is taken.
type loopback struct{ p *string }

func (v loopback) parse(text string) error {
	if text != "" {
		host, _, err := splitAddr(text)
		if err != nil {
			return err
		}
		if ip := net.ParseIP(host); host != "localhost" && (ip == nil || !ip.IsLoopback()) {
			return fmt.Errorf("%q is not an address of this machine alone: take 127.0.0.1, [::1] or localhost", text)
		}
	}
	*v.p = text
	return nil
}
func (v loopback) show() string { return *v.p }

func splitAddr(text string) (host string, port uint16, err error) {
	host, p, err := net.SplitHostPort(text)
	if err != nil {
		return "", 0, fmt.Errorf("%q is not HOST:PORT", text)
	}
	n, err := strconv.ParseUint(p, 10, 16)
	if err != nil {
		return "", 0, fmt.Errorf("%q: the port %q is not a number from 0 to 65535", text, p)
	}
	if strings.ContainsAny(host, " \t/@") {
		return "", 0, fmt.Errorf("%q: the host %q is not a name or address", text, host)
	}
	return host, uint16(n), nil
}

func isListen(text string) error {
	_, _, err := splitAddr(text)
	return err
}

func isDial(text string) error {
	host, port, err := splitAddr(text)
	if err != nil {
		return err
	}
	if unspecified(host) {
		return fmt.Errorf("%q: nobody can connect to the host %q; name the machine", text, host)
	}
	if port == 0 {
		return fmt.Errorf("%q: nobody can connect to port 0", text)
	}
	return nil
}

func unspecified(host string) bool {
	ip := net.ParseIP(host)
	return host == "" || ip != nil && ip.IsUnspecified()
}

// dials is a list of addresses to connect to; parse gets one at a time.
type dials struct{ p *[]string }

func (v dials) parse(text string) error {
	if err := isDial(text); err != nil {
		return err
	}
	*v.p = append(*v.p, text)
	return nil
}

func (v dials) show() string { return strings.Join(*v.p, ",") }

type boolean struct{ p *bool }

func (v boolean) parse(text string) error {
	b, err := strconv.ParseBool(text)
	if err != nil {
		return fmt.Errorf("%q is neither true nor false", text)
	}
	*v.p = b
	return nil
}
func (v boolean) show() string { return strconv.FormatBool(*v.p) }

// peers is a list; parse gets one entry at a time and appends.
type peers struct{ p *[]Peer }

func (v peers) parse(text string) error {
	id, addr, ok := strings.Cut(text, ":")
	if !ok {
		return fmt.Errorf("%q is not ID:HOST:PORT", text)
	}
	n, err := strconv.ParseUint(id, 10, 64)
	if err != nil {
		return fmt.Errorf("%q is not ID:HOST:PORT: the id %q is not a whole number", text, id)
	}
	if n == 0 {
		return fmt.Errorf("%q: 0 is no node id; ids start at 1", text)
	}
	if err := isDial(addr); err != nil {
		return fmt.Errorf("%q is not ID:HOST:PORT: %w", text, err)
	}
	for _, p := range *v.p {
		if p.ID == n {
			return fmt.Errorf("%q: node %d is listed twice", text, n)
		}
		if p.Addr == addr {
			return fmt.Errorf("%q: node %d has the same address", text, p.ID)
		}
	}
	*v.p = append(*v.p, Peer{ID: n, Addr: addr})
	return nil
}

func (v peers) show() string {
	parts := make([]string, len(*v.p))
	for i, p := range *v.p {
		parts[i] = p.String()
	}
	return strings.Join(parts, ",")
}

// ParsePeers parses entries of the --peers flag, for commands that take it
// without being a node.
func ParsePeers(entries []string) ([]Peer, error) {
	var list []Peer
	for _, text := range entries {
		if err := (peers{&list}).parse(text); err != nil {
			return nil, err
		}
	}
	return list, nil
}

// String returns p as the --peers flag takes it.
func (p Peer) String() string { return strconv.FormatUint(p.ID, 10) + ":" + p.Addr }

// ignored checks and remembers the value of a key without effect.
type ignored struct {
	text  string
	check func(string) error
}

func ignoredInteger() value {
	return &ignored{check: func(text string) error {
		var n uint64
		return unsigned{&n, 0, maxUint}.parse(text)
	}}
}

func (v *ignored) parse(text string) error {
	if err := v.check(text); err != nil {
		return err
	}
	v.text = text
	return nil
}
func (v *ignored) show() string { return v.text }

func isFloat(text string) error {
	if _, err := strconv.ParseFloat(text, 64); err != nil {
		return fmt.Errorf("%q is not a number", text)
	}
	return nil
}

func isBool(text string) error {
	if _, err := strconv.ParseBool(text); err != nil {
		return fmt.Errorf("%q is not true or false", text)
	}
	return nil
}
