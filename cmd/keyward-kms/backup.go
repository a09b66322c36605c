package main

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms/kmspb"
)

func newBackup(s *streams) *cobra.Command {
	var config, out string
	cmd := &cobra.Command{
		Use:   "backup",
		Short: "Write one sealed, consistent backup of a running service",
		Long: `backup asks the service on this host, over its control socket, for one sealed
file with its whole state. Only the token, or m of n recovery shares, can open
it. The file appears only when it is complete.`,
		Example: "  keyward-kms backup --config /etc/keyward/kms.json -o /mnt/usb/keyward.backup",
		Args:    noArgs,
		PreRunE: needFlags("config", "output"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := loadConfig(config)
			if err != nil {
				return err
			}
			n, err := backup(cmd.Context(), c.ControlSocket, out)
			if err != nil {
				return err
			}
			fmt.Fprintf(s.out, "%d bytes in %s\n", n, out)
			return nil
		},
	}
	cmd.Flags().StringVar(&config, "config", "", "configuration file of the running service")
	cmd.Flags().StringVarP(&out, "output", "o", "", "file to write")
	return cmd
}

// backup streams a backup from the control socket into a file.
func backup(ctx context.Context, socket, out string) (int64, error) {
	// The socket is local and answers to root only, by peer credentials.
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return 0, fmt.Errorf("%w: control socket: %w", dek.ErrUnavailable, err)
	}
	defer conn.Close()
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	stream, err := kmspb.NewAdminClient(conn).Backup(ctx, &kmspb.BackupRequest{})
	if err != nil {
		return 0, controlError(socket, err)
	}
	r := &chunkReader{stream: stream}
	if err := writeFile(out, r); err != nil {
		if r.err != nil {
			return 0, controlError(socket, r.err)
		}
		return 0, err
	}
	return r.n, nil
}

func controlError(socket string, err error) error {
	return fmt.Errorf("%w: the service at %s: %s (is keyward-kms serve running, and are you root?)",
		dek.ErrUnavailable, socket, status.Convert(err).Message())
}

// A chunkReader reads a stream of chunks.
type chunkReader struct {
	stream grpc.ServerStreamingClient[kmspb.Chunk]
	rest   []byte
	n      int64
	err    error // of the stream, apart from its end
}

func (r *chunkReader) Read(p []byte) (int, error) {
	for len(r.rest) == 0 {
		c, err := r.stream.Recv()
		if err != nil {
			if !errors.Is(err, io.EOF) {
				r.err = err
			}
			return 0, err
		}
		r.rest = c.Data
	}
	n := copy(p, r.rest)
	r.rest = r.rest[n:]
	r.n += int64(n)
	return n, nil
}
