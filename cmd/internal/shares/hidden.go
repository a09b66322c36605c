package shares

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"

	"golang.org/x/sys/unix"

	"github.com/keyward/keyward/dek"
)

// pauseMS is how soon a wait for a person sees that ctx has ended.
const pauseMS = 50

// readHidden reads one line from the terminal fd with echo off. term.ReadPassword
// can't be left before the line ends, not even by an interrupt that the program
// catches. The caller wipes the line.
func readHidden(ctx context.Context, fd int) (line []byte, err error) {
	old, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return nil, err
	}
	hidden := *old
	hidden.Lflag &^= unix.ECHO
	hidden.Lflag |= unix.ICANON | unix.ISIG
	hidden.Iflag |= unix.ICRNL
	if err := unix.IoctlSetTermios(fd, unix.TCSETS, &hidden); err != nil {
		return nil, err
	}
	// with what was typed and not read thrown away: no shell shall see it
	defer func() { err = errors.Join(err, unix.IoctlSetTermios(fd, unix.TCSETSF, old)) }()
	if err := awaitLine(ctx, fd); err != nil {
		return nil, err
	}
	b := make([]byte, maxShareBytes)
	n, err := unix.Read(fd, b) // a line, or as much of it as there is room for
	if err != nil {
		return nil, err
	}
	if n == 0 {
		return nil, io.EOF
	}
	if !bytes.HasSuffix(b[:n], []byte{'\n'}) {
		clear(b)
		return nil, fmt.Errorf("%w: a share is at most %d bytes", dek.ErrInvalid, maxShareBytes)
	}
	return b[:n], nil
}

// awaitLine returns when a whole line can be read.
func awaitLine(ctx context.Context, fd int) error {
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, pauseMS)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
		if n > 0 {
			return nil
		}
	}
}
