package rpc

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/keyward/keyward/kms"
)

// These bound the records made of strangers: they must not be able to fill the
// disk, since a log that can't be written stops the service. At one a second
// it is some 40 MB a day. What is beyond is counted, and the next record says
// how many.
const (
	strangerBurst = 100
	strangerEvery = time.Second
)

// recordTimeout bounds the wait for one record of a refusal.
const recordTimeout = 10 * time.Second

// A strangerLimit is a bucket of records that strangers may still cause.
type strangerLimit struct {
	mu      sync.Mutex
	since   time.Time // the bucket gets one every strangerEvery from here on; zero: full
	used    int
	dropped int
}

// pass reports whether a record may be made at now, and how many were not.
func (h *strangerLimit) pass(now time.Time) (ok bool, dropped int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if back := min(int(now.Sub(h.since)/strangerEvery), h.used); back > 0 {
		h.used -= back
		h.since = h.since.Add(time.Duration(back) * strangerEvery)
	}
	if h.used == 0 {
		h.since = now
	}
	if h.used >= strangerBurst {
		h.dropped++
		return false, 0
	}
	h.used++
	dropped, h.dropped = h.dropped, 0
	return true, dropped
}

// record keeps a refusal of the front door. The answer is an error either way,
// so a record that can't be made is logged.
func (s *Server) record(ctx context.Context, c *call, err error) {
	e := kms.Event{
		Time: s.config.Now(), Phase: kms.PhaseRefused, Operation: c.method.op,
		Principal: c.caller.Principal, Serial: c.caller.Serial, Remote: c.caller.Remote,
		Correlation: c.caller.Correlation, Rule: "front door", Result: resultText(err),
		Note: printable(err.Error()),
	}
	s.keep(ctx, e)
}

// refusedHandshake keeps a certificate or user that was turned away.
func (s *Server) refusedHandshake(remote string, err error) {
	s.keep(context.Background(), kms.Event{
		Time: s.config.Now(), Phase: kms.PhaseRefused, Operation: "front-door.handshake",
		Remote: remote, Rule: "front door", Result: resultText(err), Note: printable(err.Error()),
	})
}

func (s *Server) keep(ctx context.Context, e kms.Event) {
	if e.Principal == "" {
		e.Principal = kms.Anonymous
		ok, dropped := s.strangers.pass(time.Now())
		if !ok {
			s.metrics.unrecorded.Inc()
			return
		}
		if dropped > 0 {
			e.Note += fmt.Sprintf(" (%d more strangers were refused before this)", dropped)
			e.Count = dropped
		}
	}
	ctx, cancel := context.WithTimeout(ctx, recordTimeout)
	defer cancel()
	if _, err := s.config.Records.Append(ctx, e); err != nil {
		s.config.Logger.Error("a refusal could not be recorded", "operation", e.Operation, "request", e.Correlation, "error", err)
	}
}

// resultText spells a class as the service's own records do: "not-found".
func resultText(err error) string {
	return strings.ReplaceAll(strings.ToLower(classify(err).reason), "_", "-")
}
