package main

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"io"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/keyward/keyward/kms"
	"github.com/keyward/keyward/kms/audit"
)

// command runs the program in this process.
func command(t *testing.T, args ...string) (status int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	status = run(t.Context(), args, strings.NewReader(""), &out, &errs)
	return status, out.String(), errs.String()
}

// A logbook is a log that a test writes.
type logbook struct {
	*audit.Log
	t   *testing.T
	key *ecdsa.PrivateKey
}

// newLog begins a log; link is what it follows, nil for nothing.
func newLog(t *testing.T, link *audit.Link) logbook {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	l, err := audit.Open(t.Context(), audit.Config{Dir: filepath.Join(t.TempDir(), "log"), Signer: key, Link: link, CheckpointEvery: time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return logbook{l, t, key}
}

func (l logbook) add(n int) {
	l.t.Helper()
	for range n {
		e := kms.Event{Time: time.Now(), Phase: kms.PhaseRefused, Operation: kms.OpAuditRead, Principal: "person/ada", Result: "denied"}
		if _, err := l.Append(l.t.Context(), e); err != nil {
			l.t.Fatal(err)
		}
	}
}

// link is what a log needs to follow this one as it is now, once that is signed.
func (l logbook) link() *audit.Link {
	l.t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for l.Newest().Size < l.Size() {
		select {
		case <-l.t.Context().Done():
			l.t.Fatal("the head was not signed")
		case <-tick.C:
		}
	}
	head, err := l.Head(l.t.Context())
	if err != nil {
		l.t.Fatal(err)
	}
	return &audit.Link{Checkpoint: head, Key: l.key.Public()}
}

// export writes the archive of the log as it is now.
func (l logbook) export(name string) string {
	l.t.Helper()
	p := filepath.Join(l.t.TempDir(), name)
	_, err := saveWhole(p, func(w io.Writer) error { return l.Export(l.t.Context(), w) })
	if err != nil {
		l.t.Fatal(err)
	}
	return p
}

// TestVerifyLinkedLogs: a log that follows another one is checked against it.
func TestVerifyLinkedLogs(t *testing.T) {
	before := newLog(t, nil)
	before.add(30)
	before.link() // a signed head of 30 records
	cut := before.export("cut.tar")
	before.add(10)
	after := newLog(t, before.link())
	after.add(20)
	after.link()
	whole, next := before.export("before.tar"), after.export("after.tar")
	stranger := newLog(t, nil)
	stranger.add(5)
	stranger.link()
	for _, c := range []struct {
		name   string
		paths  []string
		status int
		linked bool
	}{
		{"both", []string{whole, next}, 0, true},
		{"in any order", []string{next, whole}, 0, true},
		{"the later one alone", []string{next}, 0, true},
		{"with a stranger", []string{stranger.export("other.tar"), next}, 0, true},
		{"the older one cut short", []string{cut, next}, 1, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			status, out, errs := command(t, append([]string{"audit", "verify", "--json"}, c.paths...)...)
			if status != c.status {
				t.Fatalf("exit status %d, want %d: %s%s", status, c.status, out, errs)
			}
			var v verdictView
			if err := json.Unmarshal([]byte(out), &v); err != nil {
				t.Fatal(err)
			}
			for _, l := range v.Logs {
				if l.Path == next && (l.Follows == "" || l.FollowsOK != c.linked) {
					t.Errorf("link: got %q, %v, want %v", l.Follows, l.FollowsOK, c.linked)
				}
			}
		})
	}
}
