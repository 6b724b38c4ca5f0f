package datadir

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

func TestQuarantineNote(t *testing.T) {
	dir := t.TempDir()
	if q, err := ReadQuarantine(dir); q != nil || err != nil {
		t.Fatalf("without a note: %v %v", q, err)
	}
	want := &Quarantine{Reason: "so it is", Index: 128, Epoch: 1, Own: []string{"01"}, Expected: []string{"02"}, Agreed: []uint64{1, 2},
		Since: time.Unix(1_800_000_000, 0).UTC()}
	if err := WriteQuarantine(dir, want); err != nil {
		t.Fatal(err)
	}
	if q, err := ReadQuarantine(dir); err != nil || !reflect.DeepEqual(q, want) {
		t.Errorf("read %+v %v, wrote %+v", q, err, want)
	}
	name := filepath.Join(dir, QuarantineName)
	for what, raw := range map[string]string{"half": `{"reason": "so`, "other": "please", "huge": strings.Repeat(" ", maxQuarantineBytes+1)} {
		if err := os.WriteFile(name, []byte(raw), 0o600); err != nil {
			t.Fatal(err)
		}
		if q, err := ReadQuarantine(dir); !errors.Is(err, ErrIncomplete) || !strings.Contains(err.Error(), "empty file") {
			t.Errorf("%s: %+v %v", what, q, err)
		}
	}
	if err := os.WriteFile(name, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if q, err := ReadQuarantine(dir); err != nil || q == nil || len(q.Agreed) != 0 {
		t.Errorf("an operator's: %+v %v", q, err)
	}
	if err := RemoveQuarantine(dir); err != nil {
		t.Fatal(err)
	}
	if q, err := ReadQuarantine(dir); q != nil || err != nil {
		t.Errorf("removed: %v %v", q, err)
	}
}
