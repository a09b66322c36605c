package rpc

import (
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
)

// What only tests see: the tables, and the sweep without its clock.

type Method = method

var (
	Methods      = methods
	Descriptions = descriptions
	Compile      = compileMethods
	LaneSizes    = laneSizes
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
