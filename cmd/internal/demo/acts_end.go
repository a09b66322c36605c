package main

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// disaster destroys token and key service and starts again from the backup and
// three of the five recovery shares.
func (d *demo) disaster(ctx context.Context) error {
	backup := d.path("keyward.backup")
	if _, err := d.run(ctx, nil, "keyward-kms", "backup", "--config", d.path("kms.json"), "-o", backup); err != nil {
		return err
	}
	if _, err := d.auditor(ctx, "audit", "export", "-o", d.path("audit-before.tar")); err != nil {
		return err
	}
	d.db.stop()
	d.kms.stop(syscall.SIGKILL)
	if err := errors.Join(os.RemoveAll(d.path("token")), os.RemoveAll(d.path("kms"))); err != nil {
		return err
	}
	d.say("token directory and key service directory are gone; a new, empty token:")
	if err := d.makeToken(ctx, "token2"); err != nil {
		return err
	}
	_, err := d.restore(ctx, backup, 2)
	if err != nil {
		d.say("%s", lastLines(err.Error(), 1))
	}
	d.check("two recovery shares: refused", refused(err, "shares"))
	out, err := d.restore(ctx, backup, 3)
	d.show(out, 12)
	d.check("three of five recovery shares: restored into the new token", err)
	if err != nil {
		return err
	}
	if err := d.startKMS(ctx); err != nil {
		return err
	}
	if err = await(ctx, nil, 30*time.Second, func() error {
		_, err := socketKeys(ctx, d.path("run", "agent.sock"))
		return err
	}); err == nil {
		err = d.db.start(ctx)
	}
	if err == nil {
		err = d.allRows(ctx)
	}
	if err == nil {
		err = d.db.wantCount(ctx, 2000, "SELECT COUNT(*) FROM shop.cards WHERE pad='x'")
	}
	d.check(fmt.Sprintf("the old server starts, with the agent never touched, and reads every row (%d orders, 2000 cards)", d.rows), err)
	return err
}

func (d *demo) restore(ctx context.Context, backup string, shares int) (string, error) {
	args := []string{"keyward-kms", "restore", "--config", d.path("kms.json"), "--backup", backup}
	names, err := filepath.Glob(d.path("recovery", "share-*"))
	if err != nil || len(names) != 5 {
		return "", fmt.Errorf("found %d share files, want 5: %w", len(names), err)
	}
	for _, n := range names[:shares] {
		args = append(args, "--share-file", n)
	}
	return d.run(ctx, d.softhsm, args...)
}

// auditor runs a command as the auditor.
func (d *demo) auditor(ctx context.Context, args ...string) (string, error) {
	return d.run(ctx, nil, append([]string{"keyward", "--identity", d.path("ada")}, args...)...)
}

// audit verifies the exported logs offline and then with one record removed.
func (d *demo) audit(ctx context.Context) error {
	if _, err := d.auditor(ctx, "audit", "export", "-o", d.path("audit-after.tar")); err != nil {
		return err
	}
	out, err := d.auditor(ctx, "audit", "list", "--limit", "8")
	if err != nil {
		return err
	}
	d.show(out, 10)
	out, err = d.run(ctx, nil, "keyward", "audit", "verify", d.path("audit-before.tar"), d.path("audit-after.tar"))
	d.show(out, 8)
	d.check("the records from before and after the disaster are verified offline, as one chain", err)
	seq, removed, err := removeRecord(d.path("audit-before.tar"), d.path("audit-tampered.tar"))
	if err != nil {
		return err
	}
	d.say("removed: %s", removed)
	_, err = d.run(ctx, nil, "keyward", "audit", "verify", d.path("audit-tampered.tar"))
	if err != nil {
		d.say("%s", d.shorten(lastLines(err.Error(), 2)))
	}
	d.check("one record removed: found, and named", refused(err, fmt.Sprintf("records %d to %d are missing", seq, seq)))
	return nil
}

// removeRecord copies an export without the middle record of its first segment
// and returns its number and beginning.
func removeRecord(from, to string) (seq int, removed string, err error) {
	b, err := os.ReadFile(from)
	if err != nil {
		return 0, "", err
	}
	var out bytes.Buffer
	tw := tar.NewWriter(&out)
	for tr := tar.NewReader(bytes.NewReader(b)); ; {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return 0, "", err
		}
		body, err := io.ReadAll(tr)
		if err != nil {
			return 0, "", err
		}
		lines := bytes.SplitAfter(body, []byte("\n"))
		if removed == "" && strings.HasSuffix(h.Name, ".log") && len(lines) > 4 {
			mid := len(lines) / 2
			removed = string(lines[mid][:min(len(lines[mid]), 110)])
			if _, err := fmt.Sscanf(removed, `{"seq":%d,`, &seq); err != nil {
				return 0, "", fmt.Errorf("%s: %w", removed, err)
			}
			lines = append(lines[:mid:mid], lines[mid+1:]...)
			body = bytes.Join(lines, nil)
		}
		h.Size = int64(len(body))
		if err := tw.WriteHeader(h); err != nil {
			return 0, "", err
		}
		if _, err := tw.Write(body); err != nil {
			return 0, "", err
		}
	}
	if err := tw.Close(); err != nil {
		return 0, "", err
	}
	if removed == "" {
		return 0, "", fmt.Errorf("%s holds no segment with records", filepath.Base(from))
	}
	return seq, removed, os.WriteFile(to, out.Bytes(), 0o600)
}
