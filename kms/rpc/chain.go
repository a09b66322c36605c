package rpc

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"runtime/debug"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms"
	"github.com/keyward/keyward/kms/access"
	"github.com/keyward/keyward/kms/identity"
)

// requestHeader carries the request id, both ways.
const requestHeader = "keyward-request-id"

// A call is one call on its way through the chain.
type call struct {
	method  *method
	caller  kms.Caller
	peer    *tlsPeer // nil at the control socket
	conn    io.Closer
	started time.Time
	cancel  context.CancelCauseFunc
	cuts    int // times the sweeper found it to be cut; its own
}

type callKey struct{}

// callOf returns the call of a handler's context.
func callOf(ctx context.Context) *call {
	c, _ := ctx.Value(callKey{}).(*call)
	return c
}

// callerOf returns who calls.
func callerOf(ctx context.Context) kms.Caller { return callOf(ctx).caller }

// run is the chain, the same for single calls and streams: request id,
// identity, deny list, deadline, lane, the handler, and one way out.
func (s *Server) run(ctx context.Context, m *method, invoke func(context.Context) error) error {
	c := &call{method: m, started: time.Now()}
	c.caller.Correlation = requestID(ctx)
	// A client that went away before the header is no error of ours.
	_ = grpc.SetHeader(ctx, metadata.Pairs(requestHeader, c.caller.Correlation))
	err := s.identify(ctx, c)
	if err == nil {
		err = s.enter(ctx, c, invoke)
	}
	return s.conclude(ctx, c, err)
}

// enter bounds the call in time and number and runs the handler.
func (s *Server) enter(ctx context.Context, c *call, invoke func(context.Context) error) error {
	ctx, c.cancel = context.WithCancelCause(context.WithValue(ctx, callKey{}, c))
	defer c.cancel(nil)
	if !c.method.endless {
		var stop context.CancelFunc
		ctx, stop = context.WithTimeout(ctx, c.method.deadline)
		defer stop()
	}
	leave, err := s.enterLane(ctx, c.method, c.sharer())
	if err != nil {
		return err
	}
	defer leave()
	if c.method.endless {
		s.open.add(c)
		defer s.open.remove(c)
	}
	err = contain(func() error { return invoke(ctx) })
	if cause := context.Cause(ctx); err != nil && cause != nil && !errors.As(err, new(*panicked)) && !errors.As(err, new(refusal)) {
		return cause // what cut it short, not what the handler made of that
	}
	return err
}

// identify finds out who calls and whether they may call this method at all.
func (s *Server) identify(ctx context.Context, c *call) error {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return refuse(errNobody)
	}
	switch info := p.AuthInfo.(type) {
	case *localPeer:
		c.caller.Principal, c.conn = access.LocalRoot, info.conn
		c.caller.Remote = fmt.Sprintf("unix:uid=%d,pid=%d", info.uid, info.pid)
		return nil
	case *tlsPeer:
		c.peer, c.conn, c.caller.Remote = info, info.conn, p.Addr.String()
		c.caller.Principal, c.caller.Serial = info.Principal, info.Serial
	}
	return s.standing(c)
}

// standing says whether the certificate is good for the method now. It is
// asked at every call and, for streams, again and again.
func (s *Server) standing(c *call) error {
	switch {
	case c.peer == nil && c.caller.Principal == access.LocalRoot, c.method.need == needNothing:
		return nil
	case c.peer == nil || c.peer.stranger():
		return refuse(errNobody)
	case s.backend.Enrolments.Revoked(c.caller.Principal, c.caller.Serial):
		return refuse(errRevoked)
	}
	switch c.peer.Standing(s.config.Now()) {
	case identity.Full:
		return nil
	case identity.RenewOnly:
		if c.method.need == needRenewable {
			return nil
		}
	}
	return refuse(errExpired)
}

// conclude is the one way out: it makes a record of what the service did not
// see, counts, logs, and turns the error into class and request id.
func (s *Server) conclude(ctx context.Context, c *call, err error) error {
	if errors.As(err, new(refusal)) {
		s.record(context.WithoutCancel(ctx), c, err)
	}
	took := time.Since(c.started)
	if !c.method.endless {
		s.metrics.seconds.WithLabelValues(c.method.name).Observe(took.Seconds())
	}
	if err == nil {
		s.metrics.calls.WithLabelValues(c.method.name, "OK").Inc()
		return nil
	}
	row := classify(err)
	s.metrics.calls.WithLabelValues(c.method.name, row.reason).Inc()
	level := slog.LevelDebug
	attrs := []any{
		"method", c.method.name, "class", row.reason, "request", c.caller.Correlation,
		"principal", c.caller.Principal, "remote", c.caller.Remote, "took", took, "error", err,
	}
	if p := new(panicked); errors.As(err, &p) {
		attrs = append(attrs, "stack", p.stack)
	}
	if row.code == codes.Internal {
		level = slog.LevelError
	}
	s.config.Logger.Log(ctx, level, "call failed", attrs...)
	return reply(row, c.caller.Correlation, err, c.caller.Principal != "")
}

// A panicked is a handler's panic on its way to the log.
type panicked struct {
	value any
	stack string
}

func (p *panicked) Error() string { return fmt.Sprintf("panic: %.200v", p.value) }

// contain turns a panic of one call into an error of that call: another
// caller's database must not lose its keys to it.
func contain(f func() error) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = &panicked{r, string(debug.Stack())}
		}
	}()
	return f()
}

// requestID takes the client's id if it is one, else makes one.
func requestID(ctx context.Context) string {
	if md, ok := metadata.FromIncomingContext(ctx); ok {
		if v := md.Get(requestHeader); len(v) == 1 && v[0] != "" && isID(v[0]) {
			return v[0]
		}
	}
	b := make([]byte, 16)
	if _, err := io.ReadFull(rand.Reader, b); err != nil {
		panic("rpc: internal error: no randomness: " + err.Error())
	}
	return hex.EncodeToString(b)
}

// isID accepts up to 64 of A-Z a-z 0-9 and '-', so that an id can't break a
// log line; empty is accepted.
func isID(s string) bool {
	for i := 0; i < len(s); i++ {
		c := s[i]
		if c != '-' && (c < '0' || c > '9') && (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') {
			return false
		}
	}
	return len(s) <= 64
}

// wrap returns desc with every handler inside the chain. gRPC's own
// interceptors run after a request is decoded; here the caller is known before.
func (s *Server) wrap(desc *grpc.ServiceDesc) *grpc.ServiceDesc {
	d := *desc
	d.Methods, d.Streams = nil, nil
	for _, m := range desc.Methods {
		m.Handler = s.wrapUnary(s.rows["/"+desc.ServiceName+"/"+m.MethodName], m.Handler)
		d.Methods = append(d.Methods, m)
	}
	for _, m := range desc.Streams {
		m.Handler = s.wrapStream(s.rows["/"+desc.ServiceName+"/"+m.StreamName], m.Handler)
		d.Streams = append(d.Streams, m)
	}
	return &d
}

func (s *Server) wrapUnary(m *method, handler grpc.MethodHandler) grpc.MethodHandler {
	return func(srv any, ctx context.Context, dec func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
		var resp any
		err := s.run(ctx, m, func(ctx context.Context) (err error) {
			resp, err = handler(srv, ctx, func(v any) error {
				return open(dec, v, m)
			}, nil)
			return err
		})
		if err != nil {
			return nil, err
		}
		return resp, nil
	}
}

func (s *Server) wrapStream(m *method, handler grpc.StreamHandler) grpc.StreamHandler {
	return func(srv any, stream grpc.ServerStream) error {
		return s.run(stream.Context(), m, func(ctx context.Context) error {
			return handler(srv, &callStream{stream, ctx, m})
		})
	}
}

// unknown answers methods that are in no table.
func (s *Server) unknown(_ any, stream grpc.ServerStream) error {
	m := &method{name: "unknown", op: "front-door.unknown", need: needIdentity, endless: true, lane: laneAdmin}
	return s.run(stream.Context(), m, func(context.Context) error {
		return refuse(fmt.Errorf("%w: no such method", dek.ErrDenied))
	})
}

// open reads a request through an envelope.
func open(read func(any) error, v any, m *method) error {
	e := &envelope{message: v, maxBytes: m.maxBytes}
	err := read(e)
	if status.Code(err) == codes.ResourceExhausted {
		// Longer than any method's request: gRPC has answered already, in its
		// own words; the record is still ours to make.
		return invalid("request is longer than %d bytes", maxBatchBytes)
	}
	if err != nil {
		return err
	}
	return e.err
}

// A callStream is a stream under the chain's context.
type callStream struct {
	grpc.ServerStream
	ctx    context.Context
	method *method
}

// Context returns the chain's context.
func (s *callStream) Context() context.Context { return s.ctx }

// RecvMsg tells requests that can't be read from clients that went away.
func (s *callStream) RecvMsg(v any) error {
	err := open(s.ServerStream.RecvMsg, v, s.method)
	if err == nil || errors.Is(err, io.EOF) || errors.As(err, new(refusal)) {
		return err
	}
	return fmt.Errorf("%w: receive: %w", dek.ErrUnavailable, err)
}

// SendMsg gives errors of the transport their class.
func (s *callStream) SendMsg(m any) error {
	if err := s.ServerStream.SendMsg(m); err != nil {
		return fmt.Errorf("%w: send: %w", dek.ErrUnavailable, err)
	}
	return nil
}
