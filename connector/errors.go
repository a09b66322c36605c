package connector

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/keyward/keyward/dek"
)

// errorDomain marks the error details that a Keyward service adds.
const errorDomain = "keyward"

// reasons turns ErrorInfo.Reason back into the class it was made from.
var reasons = map[string]error{
	"AUTH":         dek.ErrAuth,
	"DENIED":       dek.ErrDenied,
	"UNAVAILABLE":  dek.ErrUnavailable,
	"NOT_FOUND":    dek.ErrNotFound,
	"EXISTS":       dek.ErrExists,
	"CONFLICT":     dek.ErrConflict,
	"INVALID":      dek.ErrInvalid,
	"PRECONDITION": dek.ErrPrecondition,
	"EXHAUSTED":    dek.ErrExhausted,
	"CORRUPT":      dek.ErrCorrupt,
	"DESTROYED":    dek.ErrDestroyed,
}

// codeClass is used where no reason was given. What is not listed tells
// nothing about the outcome and is unavailable.
var codeClass = map[codes.Code]error{
	codes.PermissionDenied:   dek.ErrDenied,
	codes.Unauthenticated:    dek.ErrDenied,
	codes.NotFound:           dek.ErrNotFound,
	codes.AlreadyExists:      dek.ErrExists,
	codes.Aborted:            dek.ErrConflict,
	codes.InvalidArgument:    dek.ErrInvalid,
	codes.OutOfRange:         dek.ErrInvalid,
	codes.FailedPrecondition: dek.ErrPrecondition,
	codes.Unimplemented:      dek.ErrPrecondition,
	codes.ResourceExhausted:  dek.ErrExhausted,
	codes.DataLoss:           dek.ErrCorrupt,
}

// A CallError is a call that failed. errors.Is finds its class (package dek)
// and, where this side gave up, the context's error. Error never holds key
// bytes: the service sends a class and a request id to strangers.
type CallError struct {
	Op       string // what was asked, "unwrap acme/orders/3"
	Endpoint string // host:port that answered; several, comma separated, if none did
	Request  string // request id for the service's own log, may be empty
	Class    error  // one of the classes in package dek
	Detail   string // the service's or the transport's words, may be empty
	Cause    error  // a context error, may be nil
}

// Error names what was asked, who answered, the class, the words and the
// request id: "unwrap acme/orders/3 at kms1:7443: denied (request 4f…)".
func (e *CallError) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s at %s: %v", e.Op, e.Endpoint, e.Class)
	// the service's words often begin or end with the class
	class := e.Class.Error()
	if detail := strings.TrimSuffix(strings.TrimPrefix(e.Detail, class+": "), ": "+class); detail != "" && detail != class {
		b.WriteString(": " + detail)
	}
	if e.Request != "" {
		b.WriteString(" (request " + e.Request + ")")
	}
	return b.String()
}

// Unwrap returns the class and the cause.
func (e *CallError) Unwrap() []error {
	if e.Cause == nil {
		return []error{e.Class}
	}
	return []error{e.Class, e.Cause}
}

// decodeError turns what a generated client returned into a *CallError. It
// must only see errors of calls over authenticated connections.
func decodeError(ctx context.Context, op, endpoint string, err error) error {
	if err == nil {
		return nil
	}
	e := &CallError{Op: op, Endpoint: endpoint}
	s, ok := status.FromError(err)
	if !ok && errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
		s = status.FromContextError(err)
	}
	e.Request, e.Class = classOf(s)
	e.Detail = s.Message()
	if errors.Is(e.Class, dek.ErrUnavailable) {
		e.Detail = explainTransport(s)
		if s.Code() == codes.Unauthenticated {
			e.Detail = expiredHint
		}
		if c := context.Cause(ctx); c != nil {
			e.Cause = c
		}
	}
	return e
}

// classOf returns the request id of a status, if given, and its class.
func classOf(s *status.Status) (request string, class error) {
	for _, d := range s.Details() {
		info, ok := d.(*errdetails.ErrorInfo)
		if !ok || info.GetDomain() != errorDomain {
			continue
		}
		request = info.GetMetadata()["request"]
		if c, known := reasons[info.GetReason()]; known {
			return request, c
		}
	}
	return request, classOfCode(s.Code())
}

func classOfCode(c codes.Code) error {
	if class, ok := codeClass[c]; ok {
		return class
	}
	return dek.ErrUnavailable
}

// classOfItem is the class of one item of a batch, which carries a code only.
// What the service can't parse or open in a wrapped DEK is not authentic.
func classOfItem(code uint32) error {
	if codes.Code(code) == codes.InvalidArgument {
		return dek.ErrAuth
	}
	return classOfCode(codes.Code(code))
}

// explainTransport adds the remedy to the transport's most common words. This
// matches text because gRPC has nothing better; the class never depends on it.
func explainTransport(s *status.Status) string {
	msg := s.Message()
	for _, h := range transportHints {
		if strings.Contains(msg, h.sign) {
			return h.hint + " [" + msg + "]"
		}
	}
	return msg
}

// expiredHint is for the one answer that is neither a no nor a sick service.
const expiredHint = "by its clock the key service takes this identity's certificate for ended: compare the clocks of both hosts; if they are right, the certificate is renewed within 30 days of its end, later enrol again"

var transportHints = []struct{ sign, hint string }{
	{"unknown authority", "the server's certificate is not signed by the CA this identity was enrolled with: check the endpoint, or enrol again with a new token file"},
	{"certificate is valid for", "the server's certificate does not name this endpoint: use one of its names, or add the name to the key service's configuration"},
	{"remote error: tls", "the key service refused this identity's certificate: check that it was not revoked and that the clocks agree, or enrol again"},
	{"connection refused", "nothing listens there: start the key service or correct the endpoint"},
	{"no such host", "the name does not resolve: correct the endpoint or the DNS"},
	{"i/o timeout", "no answer: check the network and firewall between the hosts"},
	{"context deadline exceeded", "no answer in time: check the network and the key service"},
}

// retryable reports whether err tells nothing about the outcome.
func retryable(err error) bool { return errors.Is(err, dek.ErrUnavailable) }
