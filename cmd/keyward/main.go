// Command keyward is the operator's command line: people use it to manage
// vaults, keys, keyrings, roles and databases of a Keyward key service, to read
// and verify its audit log, and, offline, to make recovery shares.
//
// Results alone go to standard output, as tables or with --json; errors are one
// line "keyward: …" and, where there is a way on, one "keyward: hint: …" on
// standard error. Exit status: 0 done, 1 failed, 2 wrong use. No flag takes a
// secret: they come from files, or from a terminal with echo off.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/keyward/keyward/cmd/internal/process"
	"github.com/keyward/keyward/dek"
)

// version is set by the release build (-ldflags -X main.version=…).
var version = "dev"

func main() {
	// Shares and tokens pass through this process.
	if err := process.Harden(); err != nil {
		fmt.Fprintf(os.Stderr, "keyward: %s\n", oneLine(err))
		os.Exit(1)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// run executes one command and returns the exit status.
func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	a := &app{in: stdin, out: stdout, err: stderr}
	defer a.close()
	root := a.root()
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		return 0
	}
	var silent *exitError
	if errors.As(err, &silent) {
		return silent.code
	}
	fmt.Fprintf(stderr, "keyward: %s\n", oneLine(err))
	var wrong *usageError
	if errors.As(err, &wrong) {
		fmt.Fprintf(stderr, "keyward: hint: see `%s --help`\n", cmd.CommandPath())
		return 2
	}
	if h := hintFor(err); h != "" {
		fmt.Fprintf(stderr, "keyward: hint: %s\n", h)
	}
	return 1
}

// A usageError is a command line that can't be obeyed: exit status 2.
type usageError struct{ err error }

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }

// wrongUse makes a usageError.
func wrongUse(format string, args ...any) error {
	return &usageError{fmt.Errorf(format, args...)}
}

// asUsage marks err, if any, as wrong use.
func asUsage(err error) error {
	if err == nil {
		return nil
	}
	return &usageError{err}
}

// A hintedError brings its own way on.
type hintedError struct {
	err  error
	hint string
}

func (e *hintedError) Error() string { return e.err.Error() }
func (e *hintedError) Unwrap() error { return e.err }

// withHint adds the way on to err; nil stays nil.
func withHint(err error, format string, args ...any) error {
	if err == nil {
		return nil
	}
	return &hintedError{err, fmt.Sprintf(format, args...)}
}

// An exitError ends with a status and without words: they have been said.
type exitError struct{ code int }

func (e *exitError) Error() string { return fmt.Sprintf("exit status %d", e.code) }

// classHints is the way on where a command gives none of its own.
var classHints = []struct {
	class error
	hint  string
}{
	{context.Canceled, ""},
	{dek.ErrUnavailable, "check that the key service runs and that this host reaches it; nothing is lost by running the command again"},
	{dek.ErrDenied, "see what you may do with `keyward whoami`; an administrator grants roles with `keyward role grant`"},
	{dek.ErrNotFound, "the lists show what there is: `keyward vault list`, `keyward key list`, `keyward keyring list`, `keyward plugin list`"},
	{dek.ErrExists, "choose another name, or look at what is there with the show command"},
	{dek.ErrConflict, "somebody else changed it at the same time: look at it again and repeat the command"},
	{dek.ErrExhausted, "a limit or a disk is full: free it and run the command again"},
	{dek.ErrCorrupt, "nothing was changed; see `keyward status` and the key service's log before going on"},
}

// hintFor returns the way on for err, empty if there is none to tell.
func hintFor(err error) string {
	var h *hintedError
	if errors.As(err, &h) {
		return h.hint
	}
	for _, c := range classHints {
		if errors.Is(err, c.class) {
			return c.hint
		}
	}
	return ""
}

// oneLine keeps an error on one line, whatever it quotes.
func oneLine(err error) string {
	return strings.Join(strings.Fields(err.Error()), " ")
}
