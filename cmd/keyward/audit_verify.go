package main

import (
	"context"
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/keyward/keyward/connector"
	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms/audit"
)

// maxKeyBytes bounds a file with public audit keys.
const maxKeyBytes = 64 << 10

// A logView is what verification found in one log.
type logView struct {
	Path         string    `json:"path"`
	Log          string    `json:"log"`
	First        uint64    `json:"first"`
	Last         uint64    `json:"last"`
	Signed       uint64    `json:"signed"` // records that the newest checkpoint covers
	SignedAt     time.Time `json:"signed_at,omitzero"`
	Uncovered    uint64    `json:"uncovered"`
	TornBytes    int64     `json:"torn_bytes"`
	Follows      string    `json:"follows,omitempty"` // log it continues
	FollowsOK    bool      `json:"follows_verified,omitempty"`
	PerSecond    float64   `json:"records_per_second"`
	OK           bool      `json:"ok"`
	Bad          uint64    `json:"bad_record,omitempty"` // first bad or missing record
	BadLast      uint64    `json:"bad_record_last,omitempty"`
	BadFile      string    `json:"bad_file,omitempty"`
	BadLine      int       `json:"bad_line,omitempty"`
	Problem      string    `json:"problem,omitempty"`
	previousText []byte
	previousSize uint64
}

type verdictView struct {
	OK       bool      `json:"ok"`
	Keys     []string  `json:"keys"` // SHA-256 of the trusted public keys, hexadecimal
	KeysFrom string    `json:"keys_from"`
	Logs     []logView `json:"logs"`
}

// An auditSource is a log to be verified: a directory or an export.
type auditSource struct {
	path  string
	dir   fs.FS
	close func() error
}

func (a *app) auditVerifyCmd() *cobra.Command {
	var keyFiles []string
	cmd := &cobra.Command{
		Use:   "verify PATH...",
		Short: "Verify exported logs offline",
		Long: `Checks every record, the tree over them and the signed checkpoints of exports or
log directories, without the key service, and names the first record that was
removed, changed or put elsewhere. Of several logs, such as those before and after
a restore, it also checks that each goes on where the one before it ended. Exit
status 1 if anything is wrong.

--key pins the public audit key. Without it the key inside the export is used: that
finds every later change, but not a log that was forged whole, so compare the key's
fingerprint with one you noted before.`,
		Example: "  keyward audit verify audit.tar\n  keyward audit verify --key audit-key.pem before.tar after.tar",
		Args:    args(1, 1000),
		RunE: func(cmd *cobra.Command, paths []string) error {
			v, err := a.verify(cmd.Context(), paths, keyFiles)
			if err != nil {
				return err
			}
			if err := a.emit(v, v.print); err != nil {
				return err
			}
			for _, l := range v.Logs {
				if !l.OK {
					return withHint(fmt.Errorf("%w: %s: %s", dek.ErrCorrupt, l.Path, l.Problem),
						"keep this copy as evidence and compare it with earlier exports")
				}
			}
			return nil
		},
	}
	cmd.Flags().StringArrayVar(&keyFiles, "key", nil, "PEM `file` with the trusted public audit key; repeat it")
	_ = cmd.MarkFlagFilename("key") // the flag is defined above
	return cmd
}

// verify checks the logs one by one, then the links between them.
func (a *app) verify(ctx context.Context, paths, keyFiles []string) (verdictView, error) {
	v := verdictView{OK: true, KeysFrom: "given", Keys: []string{}, Logs: []logView{}}
	var sources []auditSource
	defer func() {
		for _, s := range sources {
			_ = s.close() // only read
		}
	}()
	for _, p := range paths {
		s, err := openSource(p)
		if err != nil {
			return v, err
		}
		sources = append(sources, s)
	}
	keys, err := readKeys(keyFiles)
	if err == nil && len(keyFiles) == 0 {
		v.KeysFrom = "the logs themselves"
		keys, err = embeddedKeys(sources)
	}
	if err != nil {
		return v, err
	}
	for _, k := range keys {
		v.Keys = append(v.Keys, fingerprint(k))
	}
	for _, s := range sources {
		l, err := a.verifyOne(ctx, s, keys, nil)
		if err != nil {
			return v, err
		}
		v.Logs = append(v.Logs, l)
	}
	if err := a.verifyLinks(ctx, sources, keys, v.Logs); err != nil {
		return v, err
	}
	for _, l := range v.Logs {
		v.OK = v.OK && l.OK
	}
	return v, nil
}

// verifyOne checks one log, which must extend the exported checkpoints.
func (a *app) verifyOne(ctx context.Context, s auditSource, keys []crypto.PublicKey, exported [][]byte) (logView, error) {
	m := a.meter("verify " + filepath.Base(s.path))
	defer m.end()
	begin := time.Now()
	r, err := audit.Verify(ctx, s.dir, audit.Check{Keys: keys, Exported: exported, Progress: func(n uint64) {
		m.at(connector.Progress{Done: int(n)}) //nolint:gosec // for people
	}})
	l := logView{Path: s.path, Log: r.Log, First: r.First, Last: r.Last, Signed: r.Newest.Size, SignedAt: r.Newest.Time,
		Uncovered: r.Uncovered, TornBytes: r.Torn, OK: err == nil}
	if took := time.Since(begin).Seconds(); took > 0 && r.Last >= r.First {
		l.PerSecond = float64(r.Last-r.First+1) / took
	}
	if r.Previous != nil {
		l.Follows, l.FollowsOK, l.previousText, l.previousSize = r.Previous.Log, r.PreviousOK, r.Previous.Text, r.Previous.Size
	}
	var p *audit.Problem
	if errors.As(err, &p) {
		l.Bad, l.BadLast, l.BadFile, l.BadLine, l.Problem = p.Seq, p.Last, p.File, p.Line, p.Error()
		return l, nil
	}
	return l, err
}

// verifyLinks proves that a log that follows another one begins where that one
// was: the head it names must be one of the other's.
func (a *app) verifyLinks(ctx context.Context, sources []auditSource, keys []crypto.PublicKey, logs []logView) error {
	for i := range logs {
		if !logs[i].OK || logs[i].Follows == "" {
			continue
		}
		for j := range logs {
			if logs[j].Log != logs[i].Follows || !logs[j].OK {
				continue
			}
			again, err := a.verifyOne(ctx, sources[j], keys, [][]byte{logs[i].previousText})
			if err != nil || !again.OK {
				logs[i].OK, logs[i].FollowsOK = false, false
				logs[i].Problem = fmt.Sprintf("it says it follows %s after record %d, which that log does not bear out: %s",
					logs[j].Path, logs[i].previousSize, orDash(again.Problem))
			}
			if err != nil && !errors.Is(err, dek.ErrAuth) && !errors.Is(err, dek.ErrCorrupt) && !errors.Is(err, dek.ErrInvalid) {
				return err
			}
		}
	}
	return nil
}

// openSource opens an export or a log's directory.
func openSource(name string) (auditSource, error) {
	st, err := os.Stat(name)
	if err != nil {
		return auditSource{}, fmt.Errorf("%w: %w", dek.ErrInvalid, err)
	}
	if st.IsDir() {
		return auditSource{name, os.DirFS(name), func() error { return nil }}, nil
	}
	t, err := openTar(name)
	if err != nil {
		return auditSource{}, err
	}
	return auditSource{name, t, t.Close}, nil
}

// readKeys reads PEM files.
func readKeys(files []string) ([]crypto.PublicKey, error) {
	var keys []crypto.PublicKey
	for _, name := range files {
		f, err := os.Open(name)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", dek.ErrInvalid, err)
		}
		got, err := parseKeys(name, f)
		f.Close()
		if err != nil {
			return nil, err
		}
		keys = append(keys, got...)
	}
	return keys, nil
}

// embeddedKeys reads the public keys that lie beside the records.
func embeddedKeys(sources []auditSource) ([]crypto.PublicKey, error) {
	var keys []crypto.PublicKey
	for _, s := range sources {
		names, err := fs.Glob(s.dir, "*.pem")
		if err != nil {
			return nil, err
		}
		for _, name := range names {
			f, err := s.dir.Open(name)
			if err != nil {
				return nil, err
			}
			got, err := parseKeys(s.path+": "+name, f)
			f.Close()
			if err != nil {
				return nil, err
			}
			for _, k := range got {
				if !slices.ContainsFunc(keys, func(o crypto.PublicKey) bool { return fingerprint(o) == fingerprint(k) }) {
					keys = append(keys, k)
				}
			}
		}
	}
	if len(keys) == 0 {
		return nil, withHint(fmt.Errorf("%w: no public audit key is given and none lies beside the records", dek.ErrInvalid),
			"give it with --key; `keyward audit export` puts it into the archive")
	}
	return keys, nil
}

func parseKeys(name string, r io.Reader) ([]crypto.PublicKey, error) {
	rest, err := io.ReadAll(io.LimitReader(r, maxKeyBytes))
	if err != nil {
		return nil, err
	}
	var keys []crypto.PublicKey
	for {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		k, err := x509.ParsePKIXPublicKey(block.Bytes)
		if block.Type != "PUBLIC KEY" || err != nil {
			return nil, fmt.Errorf("%w: %s: want PEM blocks PUBLIC KEY", dek.ErrInvalid, name)
		}
		keys = append(keys, k)
	}
	if len(keys) == 0 {
		return nil, fmt.Errorf("%w: %s holds no PEM block PUBLIC KEY", dek.ErrInvalid, name)
	}
	return keys, nil
}

// fingerprint is the SHA-256 of a public key (SPKI).
func fingerprint(k crypto.PublicKey) string {
	der, err := x509.MarshalPKIXPublicKey(k)
	if err != nil {
		return "unknown"
	}
	return connector.Fingerprint(der)
}

func (v verdictView) print(t *table) {
	t.line("audit key (%s): %s", v.KeysFrom, strings.Join(v.Keys, ", "))
	for _, l := range v.Logs {
		if !l.OK {
			t.line("%s: NOT WHOLE: %s", l.Path, l.Problem)
			continue
		}
		t.line("%s: records %d to %d are whole, %d of them under a signature of %s (%.0f records/s)",
			l.Path, l.First, l.Last, l.Signed, when(l.SignedAt), l.PerSecond)
		if l.Uncovered > 0 {
			t.line("  %d records are younger than the newest checkpoint: nothing proves them yet", l.Uncovered)
		}
		if l.TornBytes > 0 {
			t.line("  %d bytes of a record that was being written at the end", l.TornBytes)
		}
		if l.Follows != "" {
			t.line("  it follows log %s after record %d, %s", l.Follows, l.previousSize, linkState(l))
		}
	}
}

func linkState(l logView) string {
	if l.FollowsOK {
		return "by a checkpoint signed with a trusted key"
	}
	return "by a checkpoint no trusted key has signed: give that log too, or its key"
}
