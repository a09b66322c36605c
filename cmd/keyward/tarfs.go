package main

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/keyward/keyward/dek"
)

// A tarFS is the regular files of an uncompressed tar archive, by the last
// part of their names, read in place: an audit log may be larger than memory.
type tarFS struct {
	file  *os.File
	files map[string]tarEntry
}

type tarEntry struct {
	name         string
	offset, size int64
	modified     time.Time
}

// openTar indexes an archive. dek.ErrInvalid: it is none, or two of its files
// have one name. Close it.
func openTar(name string) (*tarFS, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", dek.ErrInvalid, err)
	}
	t := &tarFS{file: f, files: map[string]tarEntry{}}
	if err := t.index(); err != nil {
		f.Close()
		return nil, fmt.Errorf("%w: %s is not a tar archive that `keyward audit export` wrote: %w", dek.ErrInvalid, name, err)
	}
	return t, nil
}

func (t *tarFS) index() error {
	r := tar.NewReader(t.file)
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if h.Typeflag != tar.TypeReg {
			continue
		}
		// The reader takes whole blocks, so the file stands at the content.
		at, err := t.file.Seek(0, io.SeekCurrent)
		if err != nil {
			return err
		}
		base := path.Base(h.Name)
		if _, twice := t.files[base]; twice {
			return fmt.Errorf("it holds %s twice", base)
		}
		t.files[base] = tarEntry{base, at, h.Size, h.ModTime}
	}
}

func (t *tarFS) Close() error { return t.file.Close() }

// Open opens a file, or the one directory ".".
func (t *tarFS) Open(name string) (fs.File, error) {
	if name == "." {
		return &tarDir{t: t}, nil
	}
	e, ok := t.files[name]
	if !ok {
		return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
	}
	return &tarFile{io.NewSectionReader(t.file, e.offset, e.size), e}, nil
}

// ReadDir lists the one directory there is.
func (t *tarFS) ReadDir(name string) ([]fs.DirEntry, error) {
	if name != "." {
		return nil, &fs.PathError{Op: "readdir", Path: name, Err: fs.ErrNotExist}
	}
	var all []fs.DirEntry
	for _, e := range t.files {
		all = append(all, fs.FileInfoToDirEntry(e))
	}
	slices.SortFunc(all, func(a, b fs.DirEntry) int { return strings.Compare(a.Name(), b.Name()) })
	return all, nil
}

// A tarFile is one opened file; it can be read at any offset.
type tarFile struct {
	*io.SectionReader
	entry tarEntry
}

func (f *tarFile) Stat() (fs.FileInfo, error) { return f.entry, nil }
func (f *tarFile) Close() error               { return nil }

// A tarDir is the opened directory.
type tarDir struct{ t *tarFS }

func (d *tarDir) Stat() (fs.FileInfo, error) { return dirInfo{}, nil }
func (d *tarDir) Close() error               { return nil }
func (d *tarDir) Read([]byte) (int, error) {
	return 0, &fs.PathError{Op: "read", Path: ".", Err: errors.New("is a directory")}
}

type dirInfo struct{}

func (dirInfo) Name() string       { return "." }
func (dirInfo) Size() int64        { return 0 }
func (dirInfo) Mode() fs.FileMode  { return fs.ModeDir | 0o500 }
func (dirInfo) ModTime() time.Time { return time.Time{} }
func (dirInfo) IsDir() bool        { return true }
func (dirInfo) Sys() any           { return nil }

func (e tarEntry) Name() string       { return e.name }
func (e tarEntry) Size() int64        { return e.size }
func (e tarEntry) Mode() fs.FileMode  { return 0o400 }
func (e tarEntry) ModTime() time.Time { return e.modified }
func (e tarEntry) IsDir() bool        { return false }
func (e tarEntry) Sys() any           { return nil }
