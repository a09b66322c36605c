package rpc_test

import (
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/keyward/keyward/kms/kmspb"
	"github.com/keyward/keyward/kms/rpc"
)

// The clock of the service is off by a year: hosts' certificates look ended,
// or not yet begun. No host is told no, nothing reaches the service, the record
// names the clock, and all is well once the clock is back.
func TestServiceClockOff(t *testing.T) {
	const year = 365 * 24 * time.Hour
	for name, off := range map[string]time.Duration{"ahead": year, "behind": -year} {
		t.Run(name, func(t *testing.T) {
			d := openDoor(t)
			cert := certificate(t, d.authority, "host/db1")
			open := d.dial(t, cert)
			works := func(when string) {
				t.Helper()
				for _, conn := range []string{"open connection", "new connection"} {
					c := open
					if conn == "new connection" {
						c = d.dial(t, cert)
					}
					if _, s := exchange(t, c, kmspb.Instances_Open_FullMethodName, encode(t, good(t)[kmspb.Instances_Open_FullMethodName])); s.Code() != codes.OK {
						t.Errorf("%s, %s: %v", when, conn, s)
					}
				}
			}
			works("before")
			d.ledger.take()
			d.clock.jump(off)
			calls := d.house.calls.Load()
			for _, m := range rpc.Methods() {
				if m.ForStrangers() {
					continue
				}
				request := encode(t, good(t)[m.Name()])
				if off > 0 { // behind, an open connection was proved already
					if _, s := exchange(t, open, m.Name(), request); s.Code() != codes.Unauthenticated || reason(s) != "UNAVAILABLE" {
						t.Errorf("open connection, %s: got %v %q, want Unauthenticated UNAVAILABLE", m.Name(), s, reason(s))
					}
				}
			}
			if _, s := exchange(t, d.dial(t, cert), kmspb.Instances_Renew_FullMethodName, nil); s.Code() != codes.Unavailable || reason(s) == "DENIED" {
				t.Errorf("new connection: got %v, want unavailable", s)
			}
			if n := d.house.calls.Load() - calls; n != 0 {
				t.Errorf("%d calls reached the service", n)
			}
			var notes []string
			eventually(func() bool {
				for _, e := range d.ledger.take() {
					if e.Operation == "front-door.handshake" {
						notes = append(notes, e.Note)
					}
				}
				return len(notes) > 0
			})
			if len(notes) == 0 || !strings.Contains(notes[0], "clock") {
				t.Errorf("the record does not name the clock: %q", notes)
			}
			d.clock.jump(0)
			works("after")
		})
	}
}
