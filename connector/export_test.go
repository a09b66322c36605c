package connector

import (
	"context"
	"fmt"
	"net"
	"time"

	"github.com/keyward/keyward/dek"
)

// GoldenFrames returns every frame of PROTOCOL.md's list, by name.
func GoldenFrames() map[string][]byte {
	h := hello{kind: "mariadb", instance: "shop", cold: true}
	for i := range h.nonce {
		h.nonce[i] = byte(i)
	}
	warm := h
	warm.instance, warm.cold = "", false
	key := make([]byte, 32)
	for i := range key {
		key[i] = byte(i)
	}
	const generation = 0x0102030405060708
	list := []ListedKeyring{
		{ID: 1, Latest: 3, State: ListActive, Keyring: "acme/orders", Versions: []uint32{1, 3}},
		{ID: 2, Latest: 1, State: ListStale, Keyring: "acme/temp", Versions: []uint32{1}},
	}
	return map[string][]byte{
		"hello-cold": appendHello(nil, 1, h),
		"hello-warm": appendHello(nil, 2, warm),
		"list":       appendList(nil, 3),
		"get":        appendGet(nil, 4, ServerKey{1, 3}),
		"wait":       appendWait(nil, 5, generation, 30*time.Second),
		"report": appendReport(nil, 6, []ServerUsage{
			{ServerKey{1, 3}, time.Unix(1700000000, 0)}, {ServerKey{2, 1}, time.Unix(1700000001, 0)},
		}),
		"hello-reply":  appendHelloReply(nil, 1, Welcome{Instance: "shop", Endpoints: "kms1:7443,kms2:7443", Refresh: time.Hour}),
		"list-reply":   appendListReply(nil, 3, generation, appendListBody(nil, list)),
		"get-reply":    appendGetReply(nil, 4, ServerKey{1, 3}, key),
		"wait-reply":   appendWaitReply(nil, 5, 9),
		"report-reply": appendReportReply(nil, 6),
		"error":        appendError(nil, 7, classDenied, "no"),
	}
}

// ReadFrame cuts one frame off a connection.
func ReadFrame(c net.Conn, limit time.Duration) (op byte, seq uint32, body []byte, err error) {
	f, err := newFrameReader(c, limit).next()
	return f.op, f.seq, f.body, err
}

// Recode parses a body and encodes it again, as a whole frame.
func Recode(op byte, seq uint32, body []byte) ([]byte, error) {
	switch op {
	case opHello:
		h, err := parseHello(body)
		return appendHello(nil, seq, h), err
	case opList:
		r := newBody(body)
		return appendList(nil, seq), r.end()
	case opGet:
		k, err := parseGet(body)
		return appendGet(nil, seq, k), err
	case opWait:
		g, d, err := parseWait(body)
		return appendWait(nil, seq, g, d), err
	case opReport:
		u, err := parseReport(body)
		return appendReport(nil, seq, u), err
	case opHello | opReply:
		w, err := parseHelloReply(body)
		return appendHelloReply(nil, seq, w), err
	case opList | opReply:
		l, err := parseListReply(body)
		return appendListReply(nil, seq, l.Generation, appendListBody(nil, l.Keyrings)), err
	case opGet | opReply:
		k, key, err := parseGetReply(body)
		return appendGetReply(nil, seq, k, key), err
	case opWait | opReply:
		g, err := parseWaitReply(body)
		return appendWaitReply(nil, seq, g), err
	case opReport | opReply:
		r := newBody(body)
		return appendReportReply(nil, seq), r.end()
	case opError:
		e, err := parseError(body)
		if err != nil {
			return nil, err
		}
		return appendError(nil, seq, socketClass(e), e.Message), nil
	}
	return nil, fmt.Errorf("%w: operation", errFrame)
}

func newBody(b []byte) *body { return &body{b: b} }

// IsWait says that a frame is a WAIT, whose timeout is cut to the maximum.
func IsWait(op byte) bool { return op == opWait }

// NewerCheckpoint is newerCheckpoint.
var NewerCheckpoint = newerCheckpoint

// Bounds of unwraps that go together.
const (
	MaxCalls = maxCalls
	HoldUp   = holdUp
)

// Waiting counts the unwraps in the queue.
func (c *Client) Waiting() int { return c.flights.waiting() }

// Boarded counts the callers who wait for an unwrap.
func (c *Client) Boarded() (n int) {
	c.flights.mu.Lock()
	defer c.flights.mu.Unlock()
	for _, fl := range c.flights.m {
		n += fl.waiters
	}
	return n
}

// HoldUpFor sets how long a call keeps others waiting.
func (c *Client) HoldUpFor(d time.Duration) { c.flights.holdUp = d }

// Unwraps are flights whose calls the test answers.
type Unwraps struct{ s flights }

// NewUnwraps returns flights that call f and get new keys.
func NewUnwraps(f func(context.Context, []dek.Wrapped) error) *Unwraps {
	u := &Unwraps{s: flights{holdUp: holdUp}}
	u.s.carry = func(ctx context.Context, fls []*flight, finish finish) {
		var ws []dek.Wrapped
		for _, fl := range fls {
			ws = append(ws, fl.w)
		}
		err := f(ctx, ws)
		for _, fl := range fls {
			k := (*dek.Key)(nil)
			if err == nil {
				k, err = dek.NewKey()
			}
			finish(fl, k, err)
		}
	}
	return u
}

// Do unwraps w.
func (u *Unwraps) Do(ctx context.Context, w dek.Wrapped) (*dek.Key, error) { return u.s.do(ctx, w) }

// Waiting counts the unwraps in the queue.
func (u *Unwraps) Waiting() int { return u.s.waiting() }

func (s *flights) waiting() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.queue)
}
