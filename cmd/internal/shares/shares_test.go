package shares_test

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/keyward/keyward/cmd/internal/shares"
	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/dek/recovery"
)

// texts are the shares of a new recipient, 3 of 5, one line each.
func texts(t *testing.T) []string {
	t.Helper()
	_, list, err := recovery.Generate(3, 5, "test")
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, s := range list {
		b, err := s.Text()
		s.Destroy()
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, string(b))
	}
	return out
}

// TestJoinEntered: as many lines as the first share asks for, and no more; what
// is wrong has a class, and no share is in the words.
func TestJoinEntered(t *testing.T) {
	s, foreign := texts(t), texts(t)
	other := "0"
	if s[1][20] == '0' {
		other = "1"
	}
	flipped := s[1][:20] + other + s[1][21:]
	for _, c := range []struct {
		name  string
		lines []string
		want  error
	}{
		{"three", s[:3], nil},
		{"three others, out of order", []string{s[4], s[0], s[2]}, nil},
		{"more than needed", s, nil},
		{"spaces around", []string{"  " + s[0] + " \r", s[1], s[2]}, nil},
		{"two", s[:2], dek.ErrInvalid},
		{"none", nil, dek.ErrInvalid},
		{"one twice", []string{s[0], s[0], s[1]}, dek.ErrAuth},
		{"a foreign one", []string{s[0], s[1], foreign[2]}, dek.ErrAuth},
		{"a slip of the pen", []string{s[0], flipped, s[2]}, dek.ErrInvalid},
		{"endless", []string{strings.Repeat("a", 1<<16)}, dek.ErrInvalid},
	} {
		t.Run(c.name, func(t *testing.T) {
			var said bytes.Buffer
			in := strings.NewReader(strings.Join(c.lines, "\n")) // no line end at the last
			p, err := shares.Join(t.Context(), in, &said, nil)
			if err == nil {
				p.Destroy()
			}
			if !errors.Is(err, c.want) {
				t.Errorf("got %v, want %v", err, c.want)
			}
			if said.Len() > 0 {
				t.Errorf("said %q where nobody sits", &said)
			}
			for _, line := range c.lines {
				if err != nil && line != "" && strings.Contains(err.Error(), strings.TrimSpace(line)) {
					t.Error("a share is in the error")
				}
			}
		})
	}
}

// TestJoinFiles: files that others can read or that hold something else are
// refused by name.
func TestJoinFiles(t *testing.T) {
	s := texts(t)
	dir := t.TempDir()
	file := func(name, text string, mode os.FileMode) string {
		t.Helper()
		name = filepath.Join(dir, name)
		if err := errors.Join(os.WriteFile(name, []byte(text), 0o600), os.Chmod(name, mode)); err != nil {
			t.Fatal(err)
		}
		return name
	}
	a, b, c := file("a", s[0]+"\n", 0o600), file("b", s[1], 0o400), file("c", s[2], 0o600)
	for _, tt := range []struct {
		name  string
		files []string
		want  error
		names string
	}{
		{"good", []string{a, b, c}, nil, ""},
		{"too few", []string{a, b}, dek.ErrAuth, ""},
		{"readable by others", []string{a, b, file("open", s[3], 0o644)}, dek.ErrInvalid, "open"},
		{"absent", []string{a, filepath.Join(dir, "absent")}, dek.ErrInvalid, "absent"},
		{"a directory", []string{dir}, dek.ErrInvalid, dir},
		{"empty", []string{a, file("empty", "", 0o600)}, dek.ErrInvalid, "empty"},
		{"too long", []string{file("long", strings.Repeat("a", 4096), 0o600)}, dek.ErrInvalid, "long"},
		{"two in one", []string{file("two", s[0]+"\n"+s[1], 0o600)}, dek.ErrInvalid, "two"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p, err := shares.Join(t.Context(), strings.NewReader(""), io.Discard, tt.files)
			if err == nil {
				p.Destroy()
			}
			if !errors.Is(err, tt.want) || err != nil && !strings.Contains(err.Error(), tt.names) {
				t.Errorf("got %v, want %v that names %q", err, tt.want, tt.names)
			}
		})
	}
}
