import java.io.FileInputStream;
import java.nio.file.*;
import java.security.cert.*;
import java.util.*;

/**
 * Validates a chain (PEM, the device's certificate first, without the root) by PKIX up to the root, with CRLs of all CAs, or
 * with one OCSP response for the device in a file.ocsp.
 */
public class Pkix {
    public static void main(String[] files) throws Exception {
        CertificateFactory factory = CertificateFactory.getInstance("X.509");
        X509Certificate root = (X509Certificate) factory.generateCertificate(new FileInputStream(files[0]));
        CertPath path = factory.generateCertPath(new ArrayList<>(factory.generateCertificates(new FileInputStream(files[1]))));
        List<CRL> crls = new ArrayList<>();
        for (int i = 2; i < files.length; i++) {
            if (!files[i].endsWith(".ocsp")) crls.add(factory.generateCRL(new FileInputStream(files[i])));
        }
        PKIXParameters parameters = new PKIXParameters(Set.of(new TrustAnchor(root, null)));
        parameters.addCertStore(CertStore.getInstance("Collection", new CollectionCertStoreParameters(crls)));
        if (files[files.length - 1].endsWith(".ocsp")) {
            PKIXRevocationChecker checker =
                (PKIXRevocationChecker) CertPathValidator.getInstance("PKIX").getRevocationChecker();
            byte[] response = Files.readAllBytes(Path.of(files[files.length - 1]));
            checker.setOcspResponses(Map.of((X509Certificate) path.getCertificates().get(0), response));
            checker.setOptions(
                EnumSet.of(PKIXRevocationChecker.Option.ONLY_END_ENTITY, PKIXRevocationChecker.Option.NO_FALLBACK));
            parameters.addCertPathChecker(checker);
        }
        try {
            CertPathValidator.getInstance("PKIX").validate(path, parameters);
            System.out.println("valid");
        } catch (CertPathValidatorException error) {
            System.out.println(error.getReason());
        }
    }
}
