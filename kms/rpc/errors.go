package rpc

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

// errorDomain marks the details that we add to a status.
const errorDomain = "keyward"

// A class is one row of the error table: what a class of package dek is called
// on the wire. The reason tells classes apart that share a code.
type class struct {
	err    error
	code   codes.Code
	reason string
	// explain: the words speak of the caller's request and of objects it may
	// read, so a caller with an identity gets them.
	explain bool
}

// classes is the table, in the order in which an error is matched. What is in
// no row is internal.
func classes() []class {
	return []class{
		{dek.ErrAuth, codes.InvalidArgument, "AUTH", false},
		{dek.ErrDenied, codes.PermissionDenied, "DENIED", false},
		{dek.ErrUnavailable, codes.Unavailable, "UNAVAILABLE", false},
		{dek.ErrNotFound, codes.NotFound, "NOT_FOUND", false},
		{dek.ErrExists, codes.AlreadyExists, "EXISTS", true},
		{dek.ErrConflict, codes.Aborted, "CONFLICT", false},
		{dek.ErrInvalid, codes.InvalidArgument, "INVALID", true},
		{dek.ErrPrecondition, codes.FailedPrecondition, "PRECONDITION", true},
		{dek.ErrExhausted, codes.ResourceExhausted, "EXHAUSTED", false},
		{dek.ErrCorrupt, codes.DataLoss, "CORRUPT", false},
		{dek.ErrDestroyed, codes.Internal, "DESTROYED", false},
	}
}

// internal is the class of errors that should not be: the caller learns
// nothing about the outcome.
func internal() class {
	return class{errInternal, codes.Internal, "INTERNAL", false}
}

var (
	errInternal = errors.New("internal error")
	// errExpired: the certificate ran out; renew it, or enrol again. It is no
	// denial: the host keeps what it holds.
	errExpired = fmt.Errorf("%w: the certificate ended", dek.ErrUnavailable)
	errNobody  = fmt.Errorf("%w: no certificate", dek.ErrDenied)
	errRevoked = fmt.Errorf("%w: the identity was revoked", dek.ErrDenied)
	errClosing = fmt.Errorf("%w: the service stops", dek.ErrUnavailable)
	errBusy    = fmt.Errorf("%w: too many calls", dek.ErrUnavailable)
)

// classify finds the row of err.
func classify(err error) class {
	for _, c := range classes() {
		if errors.Is(err, c.err) {
			// Both have their class, and a code that says: mind your certificate.
			if errors.Is(err, errExpired) || errors.Is(err, errNobody) {
				c.code = codes.Unauthenticated
			}
			return c
		}
	}
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return class{dek.ErrUnavailable, codes.DeadlineExceeded, "UNAVAILABLE", false}
	case errors.Is(err, context.Canceled):
		return class{dek.ErrUnavailable, codes.Canceled, "UNAVAILABLE", false}
	}
	switch status.Code(err) { // gRPC's own health service, and its transport
	case codes.NotFound:
		return class{dek.ErrNotFound, codes.NotFound, "NOT_FOUND", false}
	case codes.Canceled, codes.DeadlineExceeded, codes.Unavailable:
		return class{dek.ErrUnavailable, status.Code(err), "UNAVAILABLE", false}
	}
	return internal()
}

// maxWords bounds the explanation in a reply, in bytes.
const maxWords = 400

// reply makes the status that leaves the house: class and request id, and the
// words where explain allows them.
func reply(c class, id string, err error, identified bool) error {
	words := c.err.Error()
	if c.explain && identified {
		words = printable(err.Error())
	}
	s := status.New(c.code, words)
	d, err := s.WithDetails(&errdetails.ErrorInfo{
		Reason: c.reason, Domain: errorDomain, Metadata: map[string]string{"request": id},
	})
	if err != nil { // only a nil or OK status can't carry details
		return s.Err()
	}
	return d.Err()
}

// printable keeps one line of text.
func printable(s string) string {
	if len(s) > maxWords {
		s = s[:maxWords]
	}
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || r == '\uFFFD' {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s, " "))
}

// A refusal is an error of the front door itself, before the service was asked:
// the service has no record of it, so the door makes one.
type refusal struct{ error }

func (r refusal) Unwrap() error { return r.error }

func refuse(err error) error { return refusal{err} }

// invalid refuses a request for one field.
func invalid(format string, args ...any) error {
	return refuse(fmt.Errorf("%w: "+format, append([]any{dek.ErrInvalid}, args...)...))
}
