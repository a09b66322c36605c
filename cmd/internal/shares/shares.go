// Package shares reads recovery shares from files or from the people who hold
// them.
package shares

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/term"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/dek/recovery"
)

// maxShareBytes bounds the text of one share with its line end.
const maxShareBytes = 1024

// Read reads one share from each file, or, without files, as many from in as
// the first one says are needed: at a terminal with echo off and the question
// on prompt, else a line each. Files must be readable by their owner alone. The
// caller destroys what is returned, also beside an error. Errors wrap
// dek.ErrInvalid and name the file or share, or are ctx's: a person at a
// terminal can be waited for no longer.
func Read(ctx context.Context, in io.Reader, prompt io.Writer, files []string) (parts []recovery.Share, err error) {
	for _, name := range files {
		s, err := readFile(name)
		if err != nil {
			return parts, err
		}
		parts = append(parts, s)
	}
	if len(files) > 0 {
		return parts, nil
	}
	ask := asker(ctx, in, prompt)
	for need := 1; len(parts) < need; {
		s, err := ask(len(parts)+1, need)
		if err != nil {
			return parts, err
		}
		parts = append(parts, s)
		need, _ = s.Threshold()
	}
	return parts, nil
}

func readFile(name string) (recovery.Share, error) {
	st, err := os.Stat(name)
	if err != nil {
		return recovery.Share{}, fmt.Errorf("%w: %w", dek.ErrInvalid, err)
	}
	if !st.Mode().IsRegular() || st.Mode().Perm()&0o077 != 0 {
		return recovery.Share{}, fmt.Errorf("%w: %s must be a regular file that only its owner can read: chmod 600 it", dek.ErrInvalid, name)
	}
	if st.Size() > maxShareBytes {
		return recovery.Share{}, fmt.Errorf("%w: %s is over %d bytes: one share per file", dek.ErrInvalid, name, maxShareBytes)
	}
	b, err := os.ReadFile(name)
	if err != nil {
		return recovery.Share{}, err
	}
	defer clear(b)
	s, err := recovery.ParseShare(bytes.TrimSpace(b))
	if err != nil {
		return recovery.Share{}, fmt.Errorf("%s: %w", name, err)
	}
	return s, nil
}

// asker asks for one share at a time: with echo off at a terminal, else
// a line each from standard input.
func asker(ctx context.Context, in io.Reader, prompt io.Writer) func(nth, need int) (recovery.Share, error) {
	if f, ok := in.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		return func(nth, need int) (recovery.Share, error) {
			fmt.Fprintf(prompt, "share %d%s (not shown): ", nth, ofNeed(nth, need))
			b, err := readHidden(ctx, int(f.Fd()))
			fmt.Fprintln(prompt)
			return parseEntered(b, err)
		}
	}
	r := bufio.NewReaderSize(in, maxShareBytes)
	return func(int, int) (recovery.Share, error) {
		b, err := r.ReadSlice('\n')
		if errors.Is(err, io.EOF) && len(b) > 0 {
			err = nil
		}
		if errors.Is(err, bufio.ErrBufferFull) {
			err = fmt.Errorf("%w: a share is at most %d bytes", dek.ErrInvalid, maxShareBytes)
		}
		return parseEntered(b, err)
	}
}

// ofNeed tells the second person how many there will be; the first share says.
func ofNeed(nth, need int) string {
	if nth == 1 {
		return ""
	}
	return fmt.Sprintf(" of %d", need)
}

func parseEntered(b []byte, err error) (recovery.Share, error) {
	defer clear(b)
	if errors.Is(err, io.EOF) {
		return recovery.Share{}, fmt.Errorf("%w: the shares end before there are enough", dek.ErrInvalid)
	}
	if err != nil {
		return recovery.Share{}, err
	}
	return recovery.ParseShare(bytes.TrimSpace(b))
}

// Join reads shares as Read does and combines them. The caller destroys the
// result. Too few shares, or one of another recipient, wrap dek.ErrAuth.
func Join(ctx context.Context, in io.Reader, prompt io.Writer, files []string) (*recovery.Private, error) {
	parts, err := Read(ctx, in, prompt, files)
	defer func() {
		for _, p := range parts {
			p.Destroy()
		}
	}()
	if err != nil {
		return nil, err
	}
	return recovery.Combine(parts)
}
