package rpc

import (
	"context"
	"time"

	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
)

// What only tests see: the tables, and the sweep without its clock.

type Method = method

var (
	Methods      = methods
	Descriptions = descriptions
	Compile      = compileMethods
)

func (m method) Name() string       { return m.name }
func (m method) ForStrangers() bool { return m.need == needNothing }
func (m method) ForExpired() bool   { return m.need != needIdentity }
func (m method) MaxBytes() int      { return m.maxBytes }

func (m *method) Edit(f func(name, op *string, maxBytes *int, lane *string)) {
	op, lane := string(m.op), string(m.lane)
	f(&m.name, &op, &m.maxBytes, &lane)
	m.op, m.lane = typed(m.op, op), laneName(lane)
}

func typed[T ~string](_ T, s string) T { return T(s) }

const MaxStrangers = maxStrangers

// A Row is one row of the error table.
type Row struct {
	Err     error
	Code    uint32
	Reason  string
	Explain bool
}

func Classes() []Row {
	var rows []Row
	for _, c := range classes() {
		rows = append(rows, Row{c.err, uint32(c.code), c.reason, c.explain})
	}
	return rows
}

// FillShare takes all of a lane that a caller may have.
func (s *Server) FillShare(t interface{ Fatal(...any) }, lane, caller string) (release func()) {
	var leaves []func()
	for range laneSizes()[laneName(lane)] / shareOf {
		leave, err := s.enterLane(context.Background(), &method{lane: laneName(lane)}, caller)
		if err != nil {
			t.Fatal(err)
		}
		leaves = append(leaves, leave)
	}
	return func() {
		for _, leave := range leaves {
			leave()
		}
	}
}

// Shares is how many shares are held or waited for.
func (s *Server) Shares() int {
	s.shares.mu.Lock()
	defer s.shares.mu.Unlock()
	return len(s.shares.held)
}

// StrangerLimit is the bucket of records of strangers.
type StrangerLimit = strangerLimit

// Pass takes one out of the bucket.
func (h *strangerLimit) Pass(now time.Time) (bool, int) { return h.pass(now) }

const (
	StrangerBurst = strangerBurst
	StrangerEvery = strangerEvery
)

// Fill takes every place of a lane and returns what gives them back.
func (s *Server) Fill(lane string) (release func()) {
	n := cap(s.lanes[laneName(lane)])
	for range n {
		s.lanes[laneName(lane)] <- struct{}{}
	}
	return func() {
		for range n {
			<-s.lanes[laneName(lane)]
		}
	}
}

func NewCodec(pool mem.BufferPool) encoding.CodecV2 { return &codec{wiping: wipingPool{pool}} }
