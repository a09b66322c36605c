package shares_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/keyward/keyward/cmd/internal/shares"
)

// A terminal is a pseudo terminal: what the person side types and what is on
// the screen.
type terminal struct {
	person, program *os.File

	mu     sync.Mutex
	screen bytes.Buffer
}

func openTerminal(t *testing.T) *terminal {
	t.Helper()
	person, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skip(err)
	}
	t.Cleanup(func() { person.Close() })
	if err := unix.IoctlSetPointerInt(int(person.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(person.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	program, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skip(err)
	}
	t.Cleanup(func() { program.Close() })
	term := &terminal{person: person, program: program}
	go func() { // ends when the terminal is closed
		b := make([]byte, 4096)
		for {
			n, err := person.Read(b)
			term.mu.Lock()
			term.screen.Write(b[:n])
			term.mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	return term
}

func (term *terminal) String() string {
	term.mu.Lock()
	defer term.mu.Unlock()
	return term.screen.String()
}

// sees waits for text on the screen.
func (term *terminal) sees(t *testing.T, text string) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for limit := time.Now().Add(10 * time.Second); !strings.Contains(term.String(), text); <-tick.C {
		if time.Now().After(limit) {
			t.Fatalf("the screen never shows %q:\n%s", text, term)
		}
	}
}

func (term *terminal) echoes(t *testing.T) bool {
	t.Helper()
	s, err := unix.IoctlGetTermios(int(term.program.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	return s.Lflag&unix.ECHO != 0
}

// TestTerminal types three shares: each is asked for, none is shown, and the
// terminal is as it was.
func TestTerminal(t *testing.T) {
	s, term := texts(t), openTerminal(t)
	done := make(chan error, 1)
	go func() {
		p, err := shares.Join(t.Context(), term.program, term.program, nil)
		if err == nil {
			p.Destroy()
		}
		done <- err
	}()
	for i, prompt := range []string{"share 1 (not shown): ", "share 2 of 3 (not shown): ", "share 3 of 3 (not shown): "} {
		term.sees(t, prompt)
		if term.echoes(t) {
			t.Errorf("share %d: echo is on", i+1)
		}
		if _, err := term.person.WriteString(s[i] + "\n"); err != nil {
			t.Fatal(err)
		}
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	for _, line := range s {
		if strings.Contains(term.String(), line[:30]) {
			t.Error("a share is on the screen")
		}
	}
	if !term.echoes(t) {
		t.Error("echo stays off")
	}
}

// TestTerminalInterrupted: who has had enough gets out, with echo on again.
func TestTerminalInterrupted(t *testing.T) {
	s, term := texts(t), openTerminal(t)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		_, err := shares.Join(ctx, term.program, term.program, nil)
		done <- err
	}()
	term.sees(t, "share 1")
	if _, err := term.person.WriteString(s[0][:20]); err != nil {
		t.Fatal(err)
	}
	cancel()
	select {
	case err := <-done:
		if !errors.Is(err, context.Canceled) {
			t.Errorf("got %v, want %v", err, context.Canceled)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("it goes on asking")
	}
	if !term.echoes(t) {
		t.Error("echo stays off")
	}
}
