package register

import (
	"bytes"
	"context"
	"crypto/rand"
	"database/sql"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/keyward/keyward/dek"
)

// proofSchema is made and dropped by Prove; a schema of this name with tables
// of anybody else's is left alone.
const proofSchema = "keyward_proof"

// systemKey is the MariaDB key id of system data; the proof's table uses it,
// since every encrypted server has it.
const systemKey = 1

// A Proof is what was seen of the encrypted table.
type Proof struct {
	KeyID     uint32 `json:"key_id"`
	Version   uint32 `json:"version"`       // server version its pages carry
	Files     bool   `json:"file_searched"` // the table's file could be read and searched
	Control   bool   `json:"control"`       // the same row was found in the file of an unencrypted table
	FileBytes int64  `json:"file_bytes"`
}

// Prove makes an encrypted table with a random row, has the server write it
// out, looks at what the server says of it and searches its file for the row;
// an unencrypted table beside it shows that the search finds what is there (a
// MyISAM one, which MariaDB never encrypts, where innodb_encrypt_tables is FORCE). Both are dropped again. dek.ErrCorrupt: the row
// was found in clear or the table is not encrypted.
func (s *Server) Prove(ctx context.Context) (p Proof, err error) {
	c, err := s.db.Conn(ctx)
	if err != nil {
		return Proof{}, classify(err)
	}
	defer c.Close()
	t := &trial{c: c}
	defer func() { err = errors.Join(err, t.drop()) }()
	if err := t.prepare(ctx); err != nil {
		return Proof{}, err
	}
	return t.look(ctx)
}

// A trial is one run of Prove on one connection: the flush lock belongs to it.
type trial struct {
	c      *sql.Conn
	canary string
	force  bool // the server refuses unencrypted InnoDB tables
	made   bool
}

func (t *trial) exec(ctx context.Context, q string, args ...any) error {
	if _, err := t.c.ExecContext(ctx, q, args...); err != nil {
		return fmt.Errorf("%s: %w", strings.SplitN(q, " (", 2)[0], classify(err))
	}
	return nil
}

func (t *trial) prepare(ctx context.Context) error {
	var foreign int
	err := t.c.QueryRowContext(ctx, `SELECT COUNT(*) FROM information_schema.TABLES
		WHERE TABLE_SCHEMA = ? AND TABLE_NAME NOT IN ('sealed', 'plain')`, proofSchema).Scan(&foreign)
	if err != nil {
		return classify(err)
	}
	if foreign > 0 {
		return fmt.Errorf("%w: schema %s holds tables that are not ours", dek.ErrExists, proofSchema)
	}
	var force string
	if err := t.c.QueryRowContext(ctx, "SELECT @@innodb_encrypt_tables").Scan(&force); err != nil {
		return classify(err)
	}
	t.force = force == "FORCE"
	raw := make([]byte, 24)
	rand.Read(raw)
	t.canary = "keyward-proof-" + hex.EncodeToString(raw)
	steps := []string{
		"SET SESSION sql_log_bin = 0", // the proof stays on this server
		"CREATE DATABASE IF NOT EXISTS " + proofSchema,
		"DROP TABLE IF EXISTS " + proofSchema + ".sealed, " + proofSchema + ".plain",
		"CREATE TABLE " + proofSchema + ".sealed (v VARCHAR(100)) ENGINE=InnoDB ENCRYPTED=YES ENCRYPTION_KEY_ID=1",
		"CREATE TABLE " + proofSchema + ".plain (v VARCHAR(100)) ENGINE=" + t.plainEngine(),
	}
	for i, q := range steps {
		if err := t.exec(ctx, q); err != nil {
			return err
		}
		t.made = t.made || i == 1
	}
	for _, table := range []string{"sealed", "plain"} {
		if err := t.exec(ctx, "INSERT INTO "+proofSchema+"."+table+" (v) VALUES (?)", t.canary); err != nil {
			return err
		}
	}
	return nil
}

func (t *trial) plainEngine() string {
	if t.force {
		return "MyISAM"
	}
	return "InnoDB ENCRYPTED=NO"
}

// flush has both tables' pages on disk; the InnoDB ones stay locked.
func (t *trial) flush(ctx context.Context) error {
	const sealed, plain = proofSchema + ".sealed", proofSchema + ".plain"
	if !t.force {
		return t.exec(ctx, "FLUSH TABLES "+sealed+", "+plain+" FOR EXPORT")
	}
	if err := t.exec(ctx, "FLUSH TABLES "+plain); err != nil {
		return err
	}
	return t.exec(ctx, "FLUSH TABLES "+sealed+" FOR EXPORT")
}

// look flushes both tables and judges what stands on disk.
func (t *trial) look(ctx context.Context) (Proof, error) {
	if err := t.flush(ctx); err != nil {
		return Proof{}, err
	}
	var p Proof
	var encrypted bool
	err := t.c.QueryRowContext(ctx, `SELECT ENCRYPTION_SCHEME, CURRENT_KEY_ID, MIN_KEY_VERSION
		FROM information_schema.INNODB_TABLESPACES_ENCRYPTION WHERE NAME = ?`, proofSchema+"/sealed").
		Scan(&encrypted, &p.KeyID, &p.Version)
	if err != nil {
		return Proof{}, fmt.Errorf("read the proof table's encryption: %w", classify(err))
	}
	if !encrypted || p.KeyID != systemKey || p.Version == 0 {
		return Proof{}, fmt.Errorf("%w: the server says the proof table is not encrypted (key id %d, version %d)", dek.ErrCorrupt, p.KeyID, p.Version)
	}
	var dir string
	if err := t.c.QueryRowContext(ctx, "SELECT @@datadir").Scan(&dir); err != nil {
		return Proof{}, classify(err)
	}
	err = t.search(dir, &p)
	return p, err
}

// search reads the tables' files, if they can be read from here.
func (t *trial) search(dir string, p *Proof) error {
	sealed, err := os.ReadFile(filepath.Join(dir, proofSchema, "sealed.ibd"))
	if errors.Is(err, fs.ErrPermission) || errors.Is(err, fs.ErrNotExist) {
		return nil // another host or user: the server's word is all there is
	}
	if err != nil {
		return fmt.Errorf("read the proof table's file: %w", err)
	}
	p.Files, p.FileBytes = true, int64(len(sealed))
	if bytes.Contains(sealed, []byte(t.canary)) {
		return fmt.Errorf("%w: the row of the encrypted proof table stands in clear in its file", dek.ErrCorrupt)
	}
	name := "plain.ibd"
	if t.force {
		name = "plain.MYD"
	}
	plain, err := os.ReadFile(filepath.Join(dir, proofSchema, name))
	if err != nil {
		return fmt.Errorf("read the control table's file: %w", err)
	}
	if !bytes.Contains(plain, []byte(t.canary)) {
		return fmt.Errorf("%w: the row of the unencrypted control table was not found in its file, so the search proves nothing", dek.ErrCorrupt)
	}
	p.Control = true
	return nil
}

// drop removes the proof, also when the caller's context has ended.
func (t *trial) drop() error {
	if !t.made {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if err := t.exec(ctx, "UNLOCK TABLES"); err != nil {
		return err
	}
	return t.exec(ctx, "DROP DATABASE IF EXISTS "+proofSchema)
}
