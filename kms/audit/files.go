package audit

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"strconv"
	"strings"

	"github.com/keyward/keyward/dek"
)

const (
	segmentSuffix    = ".log"
	checkpointSuffix = ".checkpoints"
	treeName         = "tree"
	reserveName      = "reserve"
	lockName         = "LOCK"
	seqDigits        = 20
)

func fileName(first uint64, suffix string) string {
	return fmt.Sprintf("%0*d%s", seqDigits, first, suffix)
}

// listFiles returns the first sequences of the files with suffix, ascending.
func listFiles(dir fs.FS, suffix string) ([]uint64, error) {
	entries, err := fs.ReadDir(dir, ".")
	if err != nil {
		return nil, fmt.Errorf("%w: audit: list: %w", dek.ErrUnavailable, err)
	}
	var out []uint64
	for _, e := range entries {
		digits, ok := strings.CutSuffix(e.Name(), suffix)
		if !ok {
			continue
		}
		n, err := strconv.ParseUint(digits, 10, 63)
		if err != nil || n == 0 || fileName(n, suffix) != e.Name() {
			return nil, fmt.Errorf("%w: audit: file %q does not belong here", dek.ErrCorrupt, e.Name())
		}
		out = append(out, n)
	}
	slices.Sort(out)
	return out, nil
}

// A scanner reads the lines of one segment. It stops at the end, at a NUL (the
// room made ahead in the newest segment) or at a line without an end.
type scanner struct {
	r      *bufio.Reader
	line   []byte // valid until the next call of next
	number int    // of line, from 1
	off    int64  // of the end of line
}

func newScanner(r io.Reader) *scanner {
	return &scanner{r: bufio.NewReaderSize(r, 256<<10)}
}

// next reads a line; false at the end of the whole lines. err is for errors of
// reading and for lines above MaxRecord.
func (s *scanner) next() (bool, error) {
	b, err := s.r.ReadSlice('\n')
	if len(b) > 0 && b[0] == 0 { // before ErrBufferFull: the room is larger than the buffer
		return false, nil
	}
	if errors.Is(err, bufio.ErrBufferFull) {
		return false, fmt.Errorf("%w: line %d has no end", errRecord, s.number+1)
	}
	if errors.Is(err, io.EOF) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("%w: audit: read: %w", dek.ErrUnavailable, err)
	}
	s.off += int64(len(b))
	s.number++
	s.line = b[:len(b)-1]
	return true, nil
}

// onlyNUL reports whether what follows in r is room made ahead, and how many
// bytes come before its end that are not NUL.
func onlyNUL(r io.Reader) (dirty int64, err error) {
	buf := make([]byte, 64<<10)
	var n int64
	for {
		k, err := r.Read(buf)
		if t := bytes.TrimRight(buf[:k], "\x00"); len(t) > 0 {
			dirty = n + int64(len(t))
		}
		n += int64(k)
		if errors.Is(err, io.EOF) {
			return dirty, nil
		}
		if err != nil {
			return 0, fmt.Errorf("%w: audit: read: %w", dek.ErrUnavailable, err)
		}
	}
}
